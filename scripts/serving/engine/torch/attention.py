"""Paged attention behind transformers' attention interface.

Every model calls `fn(module, query, key, value, ...)` once per layer, after RoPE, with the tokens
of all sequences flattened. `attend_paged` hands that to the `kv_step` the runner passed along:
it writes keys and values into the pool and attends over each sequence's blocks. In a flattened
step the decode tokens come first, sorted into buckets of similar length; then prefill chunks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.kv.step_access import access_of
from serving.engine.torch.latent import Latent, latent_of

NAME = "serving_paged"

# Padding a decode bucket costs bandwidth, another bucket costs calls: about this many tokens.
_MAX_PADDING_TOKENS = 512


class AttentionOptions(NamedTuple):
    """What a layer asks for beyond plain causal attention. `sinks` is one logit per query head.

    With `latent`, keys are what the KV cache keeps of each token, for all heads `[1, T, D]`, and
    values are a part of them. With `window`, a token sees so many, itself included; with `chunk`,
    those in its own chunk of so many positions.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    latent: Latent | None = None
    chunk: int | None = None

    def sees_all(self, length: int) -> bool:
        """Whether each of the first `length` tokens sees all before it."""
        return all(limit is None or limit >= length for limit in (self.window, self.chunk))


class AttentionStep(Protocol):
    """Something that can stand behind the attention layers for one forward pass.

    `query` is `[Hq, T, D]`, `key` and `value` are `[Hkv, T, D]`; returns `[T, Hq, D]`, where D is
    that of the values.
    """

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor: ...


def attend_paged(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    kv_step: AttentionStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers under `NAME`.

    The mask decides what a layer sees; what `attention_masks.learn_reaches` found there is left on
    the module. Some models say `sliding_window` without a mask of that kind, or the other way.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, chunk = module.__dict__.get("learned_reach", (sliding_window, None))
    options = AttentionOptions(scale, window, softcap, s_aux, latent_of(module), chunk)
    step = _forward.step if kv_step is None else kv_step
    return step.attend(module.layer_idx, query[0], key[0], value[0], options)[None], None


class _Forward(threading.local):
    """The step of this thread's forward pass, for models that hand no arguments down to layers."""

    step: AttentionStep


_forward = _Forward()


def begin_forward(step: AttentionStep) -> None:
    """`step` stands behind the attention layers of this thread from now on."""
    _forward.step = step


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence's part of a step: `length` new tokens from position `start`, its blocks."""

    blocks: list[int]
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class _Part:
    """Sequences attended together: a bucket of decodes, or one prefill chunk.

    `table` has the blocks of each sequence.
    """

    tokens: slice
    num_sequences: int
    lengths: np.ndarray  # KV length of each sequence
    longest: int
    first_position: int  # of the first query token; prefill only
    table: np.ndarray


class PagedStep:
    """The block tables, write positions and masks of one step, on the device."""

    def __init__(
        self, pool: KvPool, decodes: list[SequenceSpan], chunks: list[SequenceSpan]
    ) -> None:
        """`decodes` must be sorted by falling `end`, as `order_decodes` does."""
        self._pool = pool
        self._layout = pool.layout
        self._device = pool.tensor.device
        self._masks: dict[tuple[int, int | None, int | None], torch.Tensor | None] = {}
        self._access = access_of(pool, *self._new_places([*decodes, *chunks]))
        self._parts: list[_Part] = []
        first = 0
        # Where nothing is gathered, nothing is padded.
        one_part = [len(decodes)] if pool.kernels and decodes else None
        for size in one_part or _bucket_sizes([s.end for s in decodes]):
            self._add_part(decodes[first : first + size], slice(first, first + size))
            first += size
        for span in chunks:
            self._add_part([span], slice(first, first + span.length))
            first += span.length

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        pool, (layer, writes) = self._pool, self._pool.layers[layer]
        latent = options.latent
        kept = [pool.rounded(each) for each in ([key] if latent else [key, value])]
        if writes:
            self._access.write(layer, kept)
        # A chunk attends to its own tokens as later ones will, or outputs would depend on chunking.
        key, value = (kept[i].to(query.dtype) for i in (0, -1))
        outputs: list[torch.Tensor] = []
        for index, part in enumerate(self._parts):
            part_query = query[:, part.tokens]
            if latent:
                new_kept = key[:, part.tokens]
                outputs.append(
                    self._attend_latent(layer, index, part_query, new_kept, options, latent)
                )
            elif part.num_sequences == part_query.shape[1]:
                outputs.append(self._decode(layer, index, part_query, options))
            elif part.first_position == 0:
                own = (key[:, part.tokens], value[:, part.tokens])
                outputs.append(self._prefill(index, part_query, *own, options))
            else:
                outputs.append(self._prefill_after_prefix(layer, index, part_query, options))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_latent(
        self,
        layer: int,
        index: int,
        query: torch.Tensor,
        own: torch.Tensor,
        options: AttentionOptions,
        latent: Latent,
    ) -> torch.Tensor:
        """`own` is what is kept of the part's new tokens, `[1, T, D]`."""
        part, num_queries = self._parts[index], query.shape[1]
        if part.num_sequences == num_queries:
            return latent.project(self._decode(layer, index, latent.absorb(query), options))
        is_first = part.first_position == 0
        kept = own if is_first else self._access.read(layer, index, query.dtype)[0][0]
        if not is_first and not latent.prefers_expansion(num_queries, part.longest):
            # One head for all of the query's, without copies.
            shared = kept.expand(latent.num_heads, -1, -1)[None]
            absorbed = latent.absorb(query)
            return latent.project(self._masked_prefill(index, absorbed, shared, shared, options))
        key, value = latent.expand(kept, pad_values=True)
        if is_first:
            attended = self._prefill(index, query, key, value, options)
        else:
            attended = self._masked_prefill(index, query, key[None], value[None], options)
        return attended[..., : latent.value_dim]

    # --- tables --------------------------------------------------------------------------------

    def _new_places(self, spans: list[SequenceSpan]) -> tuple[np.ndarray, np.ndarray]:
        """Block of each new token, and its place there."""
        blocks, offsets = [], []
        for span in spans:
            index, offset = np.divmod(np.arange(span.start, span.end), self._layout.block_size)
            blocks.append(np.asarray(span.blocks)[index])
            offsets.append(offset)
        return np.concatenate(blocks), np.concatenate(offsets)

    def _add_part(self, spans: list[SequenceSpan], tokens: slice) -> None:
        lengths = np.asarray([span.end for span in spans])
        width = self._layout.num_blocks(int(lengths.max()))
        table = np.zeros((len(spans), width), dtype=np.int64)  # block 0 pads
        for row, span in enumerate(spans):
            used = self._layout.num_blocks(span.end)
            table[row, :used] = span.blocks[:used]
        longest = int(lengths.max())
        self._access.add_part(table, longest)
        self._parts.append(_Part(tokens, len(spans), lengths, longest, spans[0].start, table))

    # --- the three kinds of part ---------------------------------------------------------------

    def _decode(
        self, layer: int, index: int, query: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """One query token per sequence. Grouped heads become query rows: K, V are not expanded."""
        part, kernels = self._parts[index], self._pool.kernels
        is_plain = options.softcap is None and options.sinks is None
        sees_chunks = options.chunk is not None and options.chunk < part.longest
        if kernels and is_plain and not sees_chunks:
            return kernels.decode_attention(
                query.transpose(0, 1).contiguous(), self._pool.tensor, layer, part.table,
                part.lengths, scaling=options.scaling, window=options.window,
            )  # fmt: skip
        key, value = self._access.read(layer, index, query.dtype)
        num_heads, num_sequences, dim = query.shape
        grouped = query.transpose(0, 1).reshape(num_sequences, key.shape[1], -1, dim)
        mask = self._mask(index, options, query.dtype)
        sinks = None if options.sinks is None else options.sinks.view(1, key.shape[1], -1, 1)
        out = masked_attention(grouped, key, value, mask, options, sinks)
        return out.reshape(num_sequences, num_heads, -1)

    def _prefill(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """A chunk with nothing before it attends to itself: nothing is gathered."""
        is_plain = options.softcap is None and options.sinks is None
        length = query.shape[1]
        if is_plain and options.sees_all(length):
            out = scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=options.scaling,
                enable_gqa=True,
            )  # fmt: skip
            return out[0].transpose(0, 1)
        return self._masked_prefill(index, query, key[None], value[None], options)

    def _prefill_after_prefix(
        self, layer: int, index: int, query: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        key, value = self._access.read(layer, index, query.dtype)
        return self._masked_prefill(index, query, key, value, options)

    def _masked_prefill(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        groups = query.shape[0] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        mask = self._mask(index, options, query.dtype)
        sinks = None if options.sinks is None else options.sinks.view(1, -1, 1, 1)
        return masked_attention(query[None], key, value, mask, options, sinks)[0].transpose(0, 1)

    def _mask(
        self, index: int, options: AttentionOptions, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Additive mask, broadcastable to `[B, H, Q, S]`; None where all of S is visible."""
        window, chunk = options.window, options.chunk
        key = (index, window, chunk)
        if key not in self._masks:
            part = self._parts[index]
            longest = part.longest
            is_decode = part.tokens.stop - part.tokens.start == part.num_sequences
            if is_decode:
                query_positions = part.lengths[:, None] - 1  # [B, 1]
            else:
                query_positions = np.arange(part.first_position, longest)[None, :]  # [1, Q]
            behind = query_positions[:, :, None] - np.arange(longest)  # [B, Q, S]
            visible = behind >= 0
            if window is not None:
                visible &= behind < window
            if chunk is not None:
                own = query_positions[:, :, None] // chunk
                visible &= np.arange(longest) // chunk == own
            if visible.all():
                self._masks[key] = None
            else:
                hidden = torch.from_numpy(~visible).to(self._device)
                mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device)
                self._masks[key] = mask.masked_fill_(hidden, -torch.inf)[:, None]
        return self._masks[key]


def order_decodes(ends: list[int]) -> list[int]:
    """Indices of decoding sequences in the order that `PagedStep` wants: longest first."""
    return sorted(range(len(ends)), key=lambda i: -ends[i])


def _bucket_sizes(ends: list[int]) -> list[int]:
    """Split lengths, sorted falling, so that no bucket pads more than a call is worth."""
    sizes: list[int] = []
    longest = padding = 0
    for end in ends:
        if not sizes or padding + longest - end > _MAX_PADDING_TOKENS:
            sizes.append(0)
            longest, padding = end, 0
        sizes[-1] += 1
        padding += longest - end
    return sizes


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, H, Q, D]` over `[B, H, S, D]`; by hand where SDPA cannot (softcap, sinks)."""
    if options.softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=options.scaling
        )
    scores = query @ key.transpose(2, 3) * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores + mask
    scores = scores.float()
    if sinks is not None:
        column = sinks.float().expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
