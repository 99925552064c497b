"""Paged attention of one query token per sequence.

Each sequence's keys are split over programs (split-KV, "flash decoding", Dao et al. 2023), and the
parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _decode_kernel(
    q_ptr,
    pool_ptr,
    tables_ptr,
    slots_ptr,
    lengths_ptr,
    part_ptr,
    lse_ptr,
    q_stride,
    table_stride,
    plane_offset,
    block_stride,
    value_offset,
    scale,
    softcap,
    window,
    NUM_SPLITS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
        if IS_CHUNK:
            first = tl.maximum(length - 1, 0) // window * window
    begin = first // TILE * TILE
    share = tl.cdiv(tl.cdiv(length - begin, NUM_SPLITS), TILE) * TILE
    low = begin + split * share
    high = tl.minimum(low + share, length)

    group = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    in_group = group < GROUP
    in_dim = dims < DIM
    q_heads = head * GROUP + group
    q = tl.load(
        q_ptr + row * q_stride + q_heads[:, None] * DIM + dims[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    best = tl.full([GROUP_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    for start in range(low, high, TILE):
        positions = start + tl.arange(0, TILE)
        visible = positions < high
        if HAS_WINDOW:
            visible = visible & (positions >= first)
        blocks = tl.load(
            tables_ptr + slot * table_stride + positions // BLOCK_SIZE,
            mask=positions < high,
            other=0,
        ).to(tl.int64)
        offsets = blocks * block_stride + (positions % BLOCK_SIZE) * (KV_HEADS * DIM)
        offsets += plane_offset + head * DIM
        k = tl.load(
            pool_ptr + offsets[None, :] + dims[:, None],
            mask=visible[None, :] & in_dim[:, None],
            other=0.0,
        ).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A tile that is hidden as a whole leaves -inf behind: no weight, and no NaN.
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(best - shift)
        v = tl.load(
            pool_ptr + offsets[:, None] + value_offset + dims[None, :],
            mask=visible[:, None] & in_dim[None, :],
            other=0.0,
        ).to(q.dtype)
        out = out * decay[:, None]
        out = tl.dot(weights.to(q.dtype), v, out, input_precision=PRECISION)
        total = total * decay + tl.sum(weights, axis=1)
        best = new_best

    part = (row * KV_HEADS * GROUP + q_heads) * NUM_SPLITS + split
    safe = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, best + tl.log(safe), -float("inf"))
    tl.store(lse_ptr + part, lse, mask=in_group)
    tl.store(
        part_ptr + part[:, None] * DIM + dims[None, :],
        out / safe[:, None],
        mask=in_group[:, None] & in_dim[None, :],
    )


@triton.jit
def _merge_kernel(
    part_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    NUM_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    Q_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    in_dim = dims < DIM
    used = splits < NUM_SPLITS
    lse = tl.load(lse_ptr + row_head * NUM_SPLITS + splits, mask=used, other=-float("inf"))
    best = tl.max(lse, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + row_head % Q_HEADS).to(tl.float32)
        best = tl.maximum(best, sink)
    shift = tl.where(best == -float("inf"), 0.0, best)
    weights = tl.exp(lse - shift)
    total = tl.sum(weights, axis=0)
    if HAS_SINKS:
        total += tl.exp(sink - shift)
    parts = tl.load(
        part_ptr + (row_head * NUM_SPLITS + splits[:, None]) * DIM + dims[None, :],
        mask=used[:, None] & in_dim[None, :],
        other=0.0,
    )
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row_head * DIM + dims, out.to(out_ptr.dtype.element_ty), mask=in_dim)


def num_splits(num_rows: int, num_kv_heads: int, max_len: int, num_processors: int) -> int:
    """Parts of each sequence: enough programs for several waves, none below one tile.

    Fixed for a batch size, since the grid of a captured graph cannot follow the lengths.
    """
    wanted = max(4, 4 * num_processors // max(1, num_rows * num_kv_heads))
    return int(max(1, min(wanted, triton.cdiv(max_len, 64), 64)))


def paged_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    splits: int,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per row over its sequence's blocks: `[B, Hq, D]`.

    `query` is `[B, Hq, D]` with contiguous heads (any row stride); `tables` `[slots, width]`
    int32 block numbers, row `slots[b]` for row `b`; `lengths` `[B]` int32 tokens to attend to, the
    query's own included (0: the result is 0). With `window` only so many of them, with `chunk` those
    in the query's own chunk of so many positions. `sinks`: one logit per query head.
    """
    num_rows, num_q_heads, dim = query.shape
    _, _, _, block_size, num_kv_heads, _ = pool.shape
    group = num_q_heads // num_kv_heads
    part = torch.empty(
        (num_rows, num_q_heads, splits, dim), dtype=torch.float32, device=query.device
    )
    lse = torch.empty((num_rows, num_q_heads, splits), dtype=torch.float32, device=query.device)
    if num_rows == 0:
        return query.new_empty((0, num_q_heads, dim))
    padded = triton.next_power_of_2(dim)
    wide = query.dtype == torch.float32
    _decode_kernel[(num_kv_heads, splits, num_rows)](
        query,
        pool,
        tables,
        slots,
        lengths,
        part,
        lse,
        query.stride(0),
        tables.stride(0),
        layer * pool.stride(1),
        pool.stride(0),
        pool.stride(2),
        scale,
        0.0 if softcap is None else softcap,
        window or chunk or 0,
        splits,
        num_kv_heads,
        group,
        max(16, triton.next_power_of_2(group)),
        dim,
        max(16, padded),
        block_size,
        32 if wide else 64,
        softcap is not None,
        window is not None or chunk is not None,
        chunk is not None,
        "ieee" if wide else "tf32",
        num_warps=4,
        num_stages=2 if wide else 3,
    )
    return merge_splits(part, lse, query.dtype, sinks)


def merge_splits(
    part: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention `[B, Hq, D]` of what was attended to in each split, `[B, Hq, splits, D]`, and the
    log-sum-exp of its scores, `[B, Hq, splits]`."""
    num_rows, num_q_heads, splits, dim = part.shape
    out = torch.empty((num_rows, num_q_heads, dim), dtype=dtype, device=part.device)
    _merge_kernel[(num_rows * num_q_heads,)](
        part,
        lse,
        part if sinks is None else sinks,
        out,
        splits,
        triton.next_power_of_2(splits),
        num_q_heads,
        dim,
        triton.next_power_of_2(dim),
        sinks is not None,
        num_warps=2,
    )
    return out
