"""Attention over latents (MLA) of one step on CUDA; see `latent` for its two forms.

Decodes are absorbed. They read the pool through the paged kernel, which is proven once against
plain operations (`can_decode`); where it does not work, the latents are gathered. Prefill chunks
are expanded and attend as any others do, or are absorbed where the expanded keys of a long prefix
would take too much memory.
"""

from __future__ import annotations

import logging

import torch

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cuda.kernels.latent_decode import latent_decode
from serving.engine.torch.cuda.step import Chunks, CudaStep, attend_chunks
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.latent import Latent

log = logging.getLogger(__name__)

# Relative to the norm: a kernel that reads a wrong row or part differs by 1.
_KERNEL_TOLERANCE = 0.03
_SCORES_BYTES = 1 << 28  # of absorbed chunks, computed in parts


class LatentStep(CudaStep):
    """See `CudaStep`. Layers without latents attend as they do there."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        if (latent := options.latent) is None:
            return super().attend(layer, query, key, value, options)
        pool, decodes, chunks = self._pool, self._decodes, self._chunks
        own = pool.rounded(key[0])
        tokens = pool.layer_tokens(layer)
        self._store(tokens, own)
        outputs = []
        first = 0
        if decodes is not None:
            first = decodes.count
            absorbed = latent.absorb(query[:, :first]).transpose(0, 1).contiguous()
            outputs.append(latent.project(self._decode(tokens, absorbed, options, latent)))
        if chunks is not None:
            kept = own[first:] if chunks.kv_rows is None else _rows_of(tokens, chunks.kv_rows)
            kept = kept.to(query.dtype)
            outputs.append(_attend_chunks(query[:, first:], kept, chunks, options, latent))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _store(self, tokens: torch.Tensor, own: torch.Tensor) -> None:
        """Rows below 0 go nowhere: what is in block 0, which pads, is written to it again."""
        at = _indices(tokens, self._rows.clamp_min(0))
        tokens.index_put_(at, torch.where((self._rows >= 0)[:, None], own, tokens[at]))

    def _decode(
        self, tokens: torch.Tensor, query: torch.Tensor, options: AttentionOptions, latent: Latent
    ) -> torch.Tensor:
        """`[B, H, rank]` of absorbed queries `[B, H, .]`."""
        decodes = self._decodes
        assert decodes is not None
        paged = (decodes.tables, decodes.slots, decodes.lengths)
        rank, scale = latent.rank, options.scaling
        if (longest := decodes.longest) is not None:
            return gathered_decode(query, tokens, *paged, rank=rank, scale=scale, longest=longest)
        splits = decodes.splits
        return latent_decode(query, tokens, *paged, rank=rank, scale=scale, splits=splits)


def can_decode(latent: Latent, pool: KvPool) -> bool:
    """Whether the paged kernel runs on this GPU and agrees with plain operations. Before anything
    is in the pool, of which it uses leading blocks and leaves them zero."""
    device, dtype = pool.tensor.device, latent.weight.dtype
    generator = torch.Generator(device=device).manual_seed(0)
    blocks = min(5, len(pool.tensor) - 1)
    tokens = pool.layer_tokens(0)
    tokens[1 : 1 + blocks] = torch.randn(
        (blocks, *tokens.shape[1:]), generator=generator, device=device
    ).to(tokens.dtype)
    shape = (2, latent.num_heads, latent.kept_dim)
    query = torch.randn(shape, generator=generator, device=device).to(dtype)
    table = torch.arange(blocks, 0, -1, dtype=torch.int32, device=device)
    paged = (
        table[None],
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.tensor([blocks * tokens.shape[1], 1], dtype=torch.int32, device=device),
    )
    longest = blocks * tokens.shape[1]
    rank, scale = latent.rank, latent.kept_dim**-0.5
    try:
        expected = gathered_decode(
            query, tokens, *paged, rank=rank, longest=longest, scale=scale
        ).float()
        ours = latent_decode(query, tokens, *paged, rank=rank, splits=2, scale=scale).float()
    except Exception as exc:  # Triton raises errors of its own where a kernel does not fit
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        log.warning("latents are gathered, slower: the paged kernel does not run here: %s", reason)
        return False
    finally:
        pool.clear(range(1, 1 + blocks))
    error = float((ours - expected).norm() / expected.norm())
    if not error <= _KERNEL_TOLERANCE:
        log.warning("latents are gathered, slower: the paged kernel is off by %.2g", error)
        return False
    return True


def _indices(tokens: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = rows.long(), tokens.shape[1]
    return rows // size, rows % size


def _rows_of(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tokens[_indices(tokens, rows)]


def gathered_decode(
    query: torch.Tensor,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rank: int,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """What `latent_decode` computes, by plain operations; `longest` of `lengths`."""
    size = tokens.shape[1]
    blocks = tables[slots.long(), : -(-longest // size)].long()
    kept = tokens[blocks].flatten(1, 2)[:, :longest].to(query.dtype)
    hidden = torch.arange(longest, device=query.device) >= lengths[:, None]
    scores = (query @ kept.transpose(1, 2)).float() * scale
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return weights.to(query.dtype) @ kept[..., :rank]


def _attend_chunks(
    query: torch.Tensor,
    kept: torch.Tensor,
    chunks: Chunks,
    options: AttentionOptions,
    latent: Latent,
) -> torch.Tensor:
    """`kept` `[K, .]` is what the chunks attend to, sequence after sequence."""
    if latent.can_expand(len(kept)):
        parts = (query, *latent.expand(kept[None], pad_values=True))
        query, key, value = (each.transpose(0, 1).contiguous() for each in parts)
        return attend_chunks(query, key, value, chunks, options)[..., : latent.value_dim]
    counts = chunks.lengths if chunks.kv_rows is None else chunks.ends
    queries, keys = torch.split(query, chunks.lengths, dim=1), torch.split(kept, counts)
    pairs = zip(queries, keys, strict=True)
    return torch.cat([absorbed_chunk(q, k, latent, options.scaling) for q, k in pairs])


def absorbed_chunk(
    query: torch.Tensor, kept: torch.Tensor, latent: Latent, scale: float
) -> torch.Tensor:
    """The last tokens of a sequence, `[H, T, D]`, over all of it, `[S, .]`: `[T, H, value_dim]`."""
    num_keys, num_queries = len(kept), query.shape[1]
    step = max(1, _SCORES_BYTES // (4 * latent.num_heads * num_keys))
    positions = torch.arange(num_keys, device=query.device)
    outputs = []
    for first in range(0, num_queries, step):
        absorbed = latent.absorb(query[:, first : first + step])
        own = positions[num_keys - num_queries + first :][: absorbed.shape[1]]
        scores = (absorbed @ kept.T).float() * scale
        weights = scores.masked_fill(positions > own[:, None], -torch.inf).softmax(-1)
        attended = weights.to(query.dtype) @ kept[:, : latent.rank]
        outputs.append(latent.project(attended.transpose(0, 1)))
    return torch.cat(outputs)
