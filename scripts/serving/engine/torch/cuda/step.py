"""Attention of one step on CUDA: decodes over block tables, prefill chunks as one varlen batch.

The new keys and values of all tokens are written to the pool first. Decodes read it through the
paged kernel. Prefill chunks attend with FlashAttention to what was computed just now, or, where
something precedes them, to the gathered KV of their whole sequence. A long prompt that starts at
its beginning uses cuDNN's attention, nearly twice as fast on Hopper, for all but its last tokens:
cuDNN prepares a plan for each length, so it gets few different ones. What neither can do (float32,
softcap, sinks) is done by hand, a chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from serving.engine.torch.attention import AttentionOptions, masked_attention
from serving.engine.torch.cuda.kernels.decode_attention import paged_decode
from serving.engine.torch.cuda.kernels.rotary import Rotation, rotate_and_store
from serving.engine.torch.kv.pool import KvPool

_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_DIM = 256
CUDNN_TOKENS = 1024  # cuDNN attends over multiples of this


@dataclass
class Decodes:
    """Rows `0 .. count` of a step: one token each. All tensors are int32 on the device."""

    count: int
    slots: torch.Tensor  # [count]
    lengths: torch.Tensor  # [count], KV tokens including the row's own
    tables: torch.Tensor  # [slots, width], block numbers
    splits: int
    # The largest of `lengths`, where latents are gathered; None: the paged kernel reads them.
    longest: int | None = None


@dataclass
class Chunks:
    """Prefill chunks, after the decodes. Host lists beside what the device needs of them."""

    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cu_queries: torch.Tensor | None = None  # [n + 1] int32
    cu_keys: torch.Tensor | None = None
    # Pool rows (`block * block_size + offset`) of each sequence's tokens; None: nothing precedes.
    kv_rows: torch.Tensor | None = None
    # Leading tokens of the only chunk that cuDNN attends over; `cu_queries` count the others then.
    num_cudnn: int = 0

    @property
    def ends(self) -> list[int]:
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]


class CudaStep:
    """See `attention.AttentionStep`; `attend_joint` is the same for rewritten layers."""

    def __init__(
        self, pool: KvPool, rows: torch.Tensor, decodes: Decodes | None, chunks: Chunks | None
    ) -> None:
        """`rows` `[T]` int32: where in the pool each token's KV goes, below 0 for nowhere."""
        self._pool, self._rows = pool, rows
        self._decodes, self._chunks = decodes, chunks
        self._num_kv_heads = pool.layout.num_kv_heads
        self._kv_index: torch.Tensor | None = None
        has_values = pool.layout.num_planes == 2
        if has_values and chunks is not None and chunks.kv_rows is not None:
            self._kv_index = _plane_rows(pool, chunks.kv_rows)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        qkv = torch.cat([query, key, value]).transpose(0, 1).contiguous()
        rotate_and_store(qkv, self._pool.tensor, self._rows, layer, len(query))
        return self._attend(layer, qkv, len(query), options)

    def attend_joint(
        self,
        layer: int,
        qkv: torch.Tensor,
        num_q_heads: int,
        rotation: Rotation,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """`qkv` is `[T, Hq + 2 Hkv, D]`, not rotated yet; returns `[T, Hq, D]`."""
        rotate_and_store(qkv, self._pool.tensor, self._rows, layer, num_q_heads, rotation)
        return self._attend(layer, qkv, num_q_heads, options)

    def _attend(
        self, layer: int, qkv: torch.Tensor, num_q_heads: int, options: AttentionOptions
    ) -> torch.Tensor:
        query = qkv[:, :num_q_heads]
        decodes, chunks = self._decodes, self._chunks
        outputs = []
        first = 0
        if decodes is not None:
            first = decodes.count
            outputs.append(
                paged_decode(
                    query[:first],
                    self._pool.tensor,
                    layer,
                    decodes.tables,
                    decodes.slots,
                    decodes.lengths,
                    splits=decodes.splits,
                    scale=options.scaling,
                    window=options.window,
                    chunk=options.chunk,
                    softcap=options.softcap,
                    sinks=options.sinks,
                )
            )
        if chunks is not None:
            key, value = self._chunk_kv(layer, qkv[first:, num_q_heads:], query.dtype)
            outputs.append(attend_chunks(query[first:], key, value, chunks, options))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunk_kv(
        self, layer: int, own: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the chunks attend to, `[K, Hkv, D]`, sequence after sequence."""
        if self._kv_index is None:
            # As later tokens will find them, or outputs would depend on chunking.
            own = self._pool.rounded(own).to(dtype)
            return own[:, : self._num_kv_heads], own[:, self._num_kv_heads :]
        keys, values = self._kv_index[layer]
        return self._pool.read_tokens(keys, dtype), self._pool.read_tokens(values, dtype)


def _plane_rows(pool: KvPool, rows: torch.Tensor) -> torch.Tensor:
    """`[num_layers, 2, K]`: the rows of `KvPool.token_rows` for tokens at `rows`."""
    layout = pool.layout
    size, num_planes = layout.block_size, 2 * layout.num_layers
    base = rows // size * (num_planes * size) + rows % size
    planes = torch.arange(num_planes, dtype=torch.int32, device=rows.device) * size
    return (planes[:, None] + base[None, :]).view(layout.num_layers, 2, -1)


def attend_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    options: AttentionOptions,
) -> torch.Tensor:
    """Queries `[T, Hq, D]` of all chunks over keys and values `[K, Hkv, D]`: `[T, Hq, D]`."""
    is_plain = options.softcap is None and options.sinks is None
    is_fused = is_plain and query.dtype in _FLASH_DTYPES and key.shape == value.shape
    is_fused &= options.chunk is None or options.chunk >= max(chunks.ends)
    is_fused &= query.shape[-1] <= _FLASH_DIM and query.shape[-1] % 8 == 0
    return (_flash if is_fused else _by_hand)(query, key, value, chunks, options)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    options: AttentionOptions,
) -> torch.Tensor:
    first = chunks.num_cudnn
    if not first:
        return flash_varlen(query, key, value, chunks, options)
    if options.window is not None and options.window < len(query):
        return _by_hand(query, key, value, chunks, options)
    leading = cudnn_causal(query[:first], key[:first], value[:first], options.scaling)
    if first == len(query):
        return leading
    rest = flash_varlen(query[first:], key, value, chunks, options)
    return torch.cat([leading, rest])


def cudnn_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of `[T, heads, D]` by cuDNN. Raises RuntimeError where it cannot."""
    heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads, None, False, 0.0, True, False, scale=scale
    )[0]
    return out[0].transpose(0, 1)


def flash_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    options: AttentionOptions,
) -> torch.Tensor:
    """FlashAttention over all chunks. Its causal mask is aligned to the ends of both sides."""
    window = {}
    if options.window is not None:
        window = {"window_size_left": options.window - 1, "window_size_right": 0}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        chunks.cu_queries,
        chunks.cu_keys,
        max(chunks.lengths),
        max(chunks.ends),
        0.0,
        True,
        False,
        scale=options.scaling,
        **window,
    )[0]
    return out


def _by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    options: AttentionOptions,
) -> torch.Tensor:
    outputs = []
    first_query = first_key = 0
    groups = query.shape[1] // key.shape[1]
    sinks = None if options.sinks is None else options.sinks.view(1, -1, 1, 1)
    has_prefix = chunks.kv_rows is not None
    for start, length in zip(chunks.starts, chunks.lengths, strict=True):
        num_keys = start + length if has_prefix else length
        positions = torch.arange(num_keys - length, num_keys, device=query.device)[:, None]
        behind = positions - torch.arange(num_keys, device=query.device)
        hidden = behind < 0
        if options.window is not None:
            hidden |= behind >= options.window
        if options.chunk is not None:
            chunk = options.chunk
            hidden |= torch.arange(num_keys, device=query.device) // chunk != positions // chunk
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[None, None]
        heads = query[first_query : first_query + length].transpose(0, 1)[None]
        k, v = (
            x[first_key : first_key + num_keys]
            .transpose(0, 1)
            .repeat_interleave(groups, dim=0)[None]
            for x in (key, value)
        )
        out = masked_attention(heads, k, v, mask, options, sinks)
        outputs.append(out[0].transpose(0, 1))
        first_query, first_key = first_query + length, first_key + num_keys
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
