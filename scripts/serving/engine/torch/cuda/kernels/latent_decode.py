"""Paged attention of one query token per sequence over latents (MLA), absorbed.

All heads attend to one vector a token: `rank` numbers, which are key and value, then `rope` numbers,
which are key only. So a tile is loaded once for many heads, and its latent part serves both
products. The rest is as in `decode_attention`, whose merge of split sequences is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from serving.engine.torch.cuda.kernels.decode_attention import merge_splits

_HEADS = 16  # of one program: what a tensor core multiplies at once


@triton.jit
def _latent_kernel(
    q_ptr,
    tokens_ptr,
    tables_ptr,
    slots_ptr,
    lengths_ptr,
    part_ptr,
    lse_ptr,
    q_stride,
    table_stride,
    block_stride,
    scale,
    NUM_SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    share = tl.cdiv(tl.cdiv(length, NUM_SPLITS), TILE) * TILE
    low = split * share
    high = tl.minimum(low + share, length)

    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    is_head = heads < NUM_HEADS
    ranks = tl.arange(0, RANK_PADDED)
    in_rank = ranks < RANK
    ropes = tl.arange(0, ROPE_PADDED)
    in_rope = ropes < ROPE
    q_rows = q_ptr + row * q_stride + heads[:, None] * (RANK + ROPE)
    q_latent = tl.load(q_rows + ranks[None, :], mask=is_head[:, None] & in_rank[None, :], other=0.0)
    q_shared = tl.load(
        q_rows + RANK + ropes[None, :], mask=is_head[:, None] & in_rope[None, :], other=0.0
    )
    best = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([HEADS, RANK_PADDED], tl.float32)
    for start in range(low, high, TILE):
        positions = start + tl.arange(0, TILE)
        visible = positions < high
        blocks = tl.load(
            tables_ptr + slot * table_stride + positions // BLOCK_SIZE, mask=visible, other=0
        ).to(tl.int64)
        kept = tokens_ptr + blocks * block_stride
        kept += (positions % BLOCK_SIZE) * (RANK + ROPE)
        latent = tl.load(
            kept[:, None] + ranks[None, :], mask=visible[:, None] & in_rank[None, :], other=0.0
        ).to(q_latent.dtype)
        shared = tl.load(
            kept[None, :] + RANK + ropes[:, None],
            mask=visible[None, :] & in_rope[:, None],
            other=0.0,
        ).to(q_latent.dtype)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_shared, shared, scores, input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_best[:, None])
        decay = tl.exp(best - new_best)
        out = out * decay[:, None]
        out = tl.dot(weights.to(q_latent.dtype), latent, out, input_precision=PRECISION)
        total = total * decay + tl.sum(weights, axis=1)
        best = new_best

    part = (row * NUM_HEADS + heads) * NUM_SPLITS + split
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, best + tl.log(safe), -float("inf"))
    tl.store(lse_ptr + part, lse, mask=is_head)
    tl.store(
        part_ptr + part[:, None] * RANK + ranks[None, :],
        out / safe[:, None],
        mask=is_head[:, None] & in_rank[None, :],
    )


def num_latent_splits(num_rows: int, num_heads: int, max_len: int, num_processors: int) -> int:
    """Parts of each sequence, fixed for a batch size; see `decode_attention.num_splits`."""
    programs = num_rows * triton.cdiv(num_heads, _HEADS)
    wanted = max(1, 2 * num_processors // max(1, programs))
    return int(max(1, min(wanted, triton.cdiv(max_len, 64), 64)))


def latent_decode(
    query: torch.Tensor,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    rank: int,
    splits: int,
    scale: float,
) -> torch.Tensor:
    """The latents that one absorbed query per row and head attends to: `[B, H, rank]`.

    `query` is `[B, H, rank + rope]`, contiguous; `tokens` `[num_blocks, block_size, rank + rope]`,
    one layer of the pool, with any stride between blocks. The rest is as in `paged_decode`.
    """
    num_rows, num_heads, kept = query.shape
    shape = (num_rows, num_heads, splits)
    part = torch.empty((*shape, rank), dtype=torch.float32, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if num_rows == 0:
        return query.new_empty((0, num_heads, rank))
    wide = query.dtype == torch.float32
    _latent_kernel[(triton.cdiv(num_heads, _HEADS), splits, num_rows)](
        query,
        tokens,
        tables,
        slots,
        lengths,
        part,
        lse,
        query.stride(0),
        tables.stride(0),
        tokens.stride(0),
        scale,
        splits,
        num_heads,
        _HEADS,
        rank,
        max(16, triton.next_power_of_2(rank)),
        kept - rank,
        max(16, triton.next_power_of_2(kept - rank)),
        tokens.shape[1],
        16 if wide else 32,
        "ieee" if wide else "tf32",
        num_warps=4,
        num_stages=2,
    )
    return merge_splits(part, lse, query.dtype)
