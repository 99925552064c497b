"""Triton kernels of the CUDA path. Nothing else is here: who calls them, and when, is elsewhere.

Each wrapper allocates its output (CUDA graphs then own that memory), takes no value from the
device, and launches on the current stream, so all of them can be captured. Accumulation is in
float32 whatever the inputs are. The KV pool is addressed as `[block, layer, 2, block_size, Hkv, D]`
(`kv_layout`), given by strides.

Paged decode attention splits each sequence's keys over programs (split-KV, "flash decoding",
Dao et al. 2023) and merges the parts by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# --- normalisation ---------------------------------------------------------------------------

# How an RMSNorm rounds: its class decides, `fusion` finds out which one it is.
CAST_THEN_SCALE = 0  # weight * normed.to(dtype)
SCALE_THEN_CAST = 1  # (weight * normed).to(dtype), all in float32
ONE_PLUS_WEIGHT = 2  # ((1 + weight) * normed).to(dtype), all in float32


@triton.jit
def _scale_rows(normed, weight, dtype: tl.constexpr, STYLE: tl.constexpr):
    if STYLE == 0:
        return normed.to(dtype).to(tl.float32) * weight
    if STYLE == 1:
        return normed * weight
    return normed * (1.0 + weight)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    STYLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    offsets = row * size + columns
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    dtype = x.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + offsets, x, mask=mask)
    x32 = x.to(tl.float32)
    variance = tl.sum(x32 * x32, axis=0) / size
    normed = x32 / tl.sqrt(variance + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, _scale_rows(normed, weight, dtype, STYLE).to(dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, style: int) -> torch.Tensor:
    """RMSNorm over the last axis of a contiguous `x`."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    num_rows = x.numel() // size
    if num_rows:
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(num_rows,)](
            x, x, weight, x, out, size, eps, False, style, block, num_warps=_norm_warps(block)
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, style: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x + residual, RMSNorm(x + residual))`, both rounded to the dtype of `x`."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    num_rows = x.numel() // size
    if num_rows:
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(num_rows,)](
            x, residual, weight, total, out, size, eps, True, style, block,
            num_warps=_norm_warps(block),
        )  # fmt: skip
    return total, out


def _norm_warps(block: int) -> int:
    return min(16, max(1, block // 512))


# --- a linear layer for one row ----------------------------------------------------------------


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, out_ptr, num_out, num_in, ROWS: tl.constexpr, TILE: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_out
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(0, num_in, TILE):
        columns = start + tl.arange(0, TILE)
        weight = tl.load(
            weight_ptr + rows[:, None].to(tl.int64) * num_in + columns[None, :],
            mask=in_rows[:, None],
            other=0.0,
        )
        x = tl.load(x_ptr + columns)
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, axis=1)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=in_rows)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`. One row is bound by the weight's bytes, which cuBLAS reads at 80 to
    95% of the memory's speed; this kernel reads them at all of it."""
    num_out, num_in = weight.shape
    small = num_out <= 4096
    tile = 2048 if small else 1024
    plain = x.numel() == num_in and bias is None and x.element_size() == 2
    if not plain or num_in % tile or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], num_out))
    rows = 2 if small else 8
    _gemv_kernel[(triton.cdiv(num_out, rows),)](
        x, weight, out, num_out, num_in, rows, tile, num_warps=4 if small else 8, num_stages=3
    )
    return out


# --- gated activation ------------------------------------------------------------------------

ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}


@triton.jit
def _gated_kernel(x_ptr, out_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x_ptr + row * 2 * size + columns, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * 2 * size + size + columns, mask=mask, other=0.0)
    g = gate.to(tl.float32)
    if KIND == 0:
        activated = g * tl.sigmoid(g)
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        activated = g * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(x)) = sigmoid(2x)
    out = activated.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + columns, out.to(gate.dtype), mask=mask)


def gated_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` of `[..., 2 * size]`, gate first; contiguous in, `[..., size]` out."""
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    num_rows = x.numel() // (2 * size)
    if num_rows:
        block = min(1024, triton.next_power_of_2(size))
        grid = (triton.cdiv(size, block), num_rows)
        _gated_kernel[grid](x, out, size, ACTIVATIONS[activation], block, num_warps=4)
    return out


# --- rotary positions and writing KV ---------------------------------------------------------


@triton.jit
def _load_halves(ptr, head_offsets, half, in_half, head_mask, HALF: tl.constexpr):
    mask = head_mask[:, None] & in_half[None, :]
    first = tl.load(ptr + head_offsets[:, None] + half[None, :], mask=mask, other=0.0)
    second = tl.load(ptr + head_offsets[:, None] + HALF + half[None, :], mask=mask, other=0.0)
    return first, second, mask


@triton.jit
def _store_heads_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    pool_ptr,
    rows_ptr,
    token_stride,
    plane_offset,
    block_stride,
    value_offset,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    STYLE: tl.constexpr,
):
    """One token, `HEADS` heads of one kind. Program axis 1: query tiles, key tiles, value tiles.

    STYLE < 0: queries and keys are not normalised.
    """
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_tiles: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    DIM: tl.constexpr = 2 * HALF
    is_query = tile < q_tiles
    is_value = tile >= q_tiles + kv_tiles
    local = tl.where(is_query, tile, tl.where(is_value, tile - q_tiles - kv_tiles, tile - q_tiles))
    heads = local * HEADS + tl.arange(0, HEADS)
    head_mask = heads < tl.where(is_query, Q_HEADS, KV_HEADS)
    first_head = tl.where(is_query, 0, tl.where(is_value, Q_HEADS + KV_HEADS, Q_HEADS))
    half = tl.arange(0, HALF_PADDED)
    in_half = half < HALF
    source = qkv_ptr + token * token_stride
    offsets = (first_head + heads) * DIM
    first, second, mask = _load_halves(source, offsets, half, in_half, head_mask, HALF)
    dtype = first.dtype
    if is_value == 0:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if STYLE >= 0:
            variance = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / DIM
            scale = 1.0 / tl.sqrt(variance + eps)
            weight_ptr = k_weight_ptr
            if is_query:
                weight_ptr = q_weight_ptr
            w_a = tl.load(weight_ptr + half, mask=in_half, other=0.0).to(tl.float32)
            w_b = tl.load(weight_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)
            a = _scale_rows(a * scale[:, None], w_a[None, :], dtype, STYLE)
            b = _scale_rows(b * scale[:, None], w_b[None, :], dtype, STYLE)
            a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
        if ROTATE:
            cos_a = tl.load(cos_ptr + token * DIM + half, mask=in_half, other=0.0).to(tl.float32)
            sin_a = tl.load(sin_ptr + token * DIM + half, mask=in_half, other=0.0).to(tl.float32)
            cos_b = tl.load(cos_ptr + token * DIM + HALF + half, mask=in_half, other=0.0)
            sin_b = tl.load(sin_ptr + token * DIM + HALF + half, mask=in_half, other=0.0)
            new_a = a * cos_a[None, :] - b * sin_a[None, :]
            new_b = b * cos_b.to(tl.float32)[None, :] + a * sin_b.to(tl.float32)[None, :]
            a, b = new_a, new_b
        first, second = a.to(dtype), b.to(dtype)
        target = qkv_ptr + token * token_stride
        tl.store(target + offsets[:, None] + half[None, :], first, mask=mask)
        tl.store(target + offsets[:, None] + HALF + half[None, :], second, mask=mask)
    if is_query == 0:
        row = tl.load(rows_ptr + token).to(tl.int64)
        keep = mask & (row >= 0)
        offset = (row // BLOCK_SIZE) * block_stride + (row % BLOCK_SIZE) * (KV_HEADS * DIM)
        offset += plane_offset + tl.where(is_value, value_offset, 0)
        place = pool_ptr + offset + heads[:, None] * DIM + half[None, :]
        kept = pool_ptr.dtype.element_ty
        tl.store(place, first.to(kept), mask=keep)
        tl.store(place + HALF, second.to(kept), mask=keep)


def rotate_and_store(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    layer: int,
    *,
    num_q_heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    norm_style: int = -1,
) -> None:
    """Normalise and rotate queries and keys in place, and write keys and values to the pool.

    `qkv` is `[T, Hq + 2 Hkv, D]` with contiguous heads, `pool` the whole KV pool, `rows` `[T]`
    int32: `block * block_size + offset` of each token, below 0 for tokens that are kept nowhere.
    `cos` and `sin` are `[T, D]`; without them nothing is rotated. Half-rotation as in GPT-NeoX.
    """
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    _, _, _, block_size, num_kv_heads, dim = pool.shape
    tile = min(8, triton.next_power_of_2(num_kv_heads))
    grid = (num_tokens, triton.cdiv(num_q_heads, tile) + 2 * triton.cdiv(num_kv_heads, tile))
    absent = qkv
    _store_heads_kernel[grid](
        qkv,
        absent if cos is None else cos,
        absent if sin is None else sin,
        absent if q_weight is None else q_weight,
        absent if k_weight is None else k_weight,
        pool,
        rows,
        qkv.stride(0),
        layer * pool.stride(1),
        pool.stride(0),
        pool.stride(2),
        eps,
        num_q_heads,
        num_kv_heads,
        dim // 2,
        triton.next_power_of_2(dim // 2),
        block_size,
        tile,
        cos is not None,
        norm_style,
        num_warps=2,
    )


# --- paged decode attention ------------------------------------------------------------------


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
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0) // TILE * TILE
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
            visible = visible & (positions >= length - window)
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
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token per row over its sequence's blocks: `[B, Hq, D]`.

    `query` is `[B, Hq, D]` with contiguous heads (any row stride); `tables` `[slots, width]`
    int32 block numbers, row `slots[b]` for row `b`; `lengths` `[B]` int32 tokens to attend to, the
    query's own included (0: the result is 0). `sinks`: one logit per query head.
    """
    num_rows, num_q_heads, dim = query.shape
    _, _, _, block_size, num_kv_heads, _ = pool.shape
    group = num_q_heads // num_kv_heads
    part = torch.empty(
        (num_rows, num_q_heads, splits, dim), dtype=torch.float32, device=query.device
    )
    lse = torch.empty((num_rows, num_q_heads, splits), dtype=torch.float32, device=query.device)
    out = torch.empty((num_rows, num_q_heads, dim), dtype=query.dtype, device=query.device)
    if num_rows == 0:
        return out
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
        0 if window is None else window,
        splits,
        num_kv_heads,
        group,
        max(16, triton.next_power_of_2(group)),
        dim,
        max(16, padded),
        block_size,
        32 if wide else 64,
        softcap is not None,
        window is not None,
        "ieee" if wide else "tf32",
        num_warps=4,
        num_stages=2 if wide else 3,
    )
    _merge_kernel[(num_rows * num_q_heads,)](
        part,
        lse,
        part if sinks is None else sinks,
        out,
        splits,
        triton.next_power_of_2(splits),
        num_q_heads,
        dim,
        padded,
        sinks is not None,
        num_warps=2,
    )
    return out
