"""Rotary positions, norms of queries and keys, and writing keys and values to the pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from serving.engine.torch.cuda.kernels.norm import scale_rows


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
            a = scale_rows(a * scale[:, None], w_a[None, :], dtype, STYLE)
            b = scale_rows(b * scale[:, None], w_b[None, :], dtype, STYLE)
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
        in_pool = pool_ptr + offset + heads[:, None] * DIM + half[None, :]
        kept = pool_ptr.dtype.element_ty
        tl.store(in_pool, first.to(kept), mask=keep)
        tl.store(in_pool + HALF, second.to(kept), mask=keep)


@dataclass(frozen=True)
class Rotation:
    """Norms and rotary positions of queries and keys before attention. `cos`, `sin`: `[T, D]`.

    Half-rotation as in GPT-NeoX. Without weights nothing is normalised.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 0.0
    norm_style: int = -1


def rotate_and_store(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    layer: int,
    num_q_heads: int,
    rotation: Rotation | None = None,
) -> None:
    """Normalise and rotate queries and keys in place, and write keys and values to the pool.

    `qkv` is `[T, Hq + 2 Hkv, D]` with contiguous heads, `pool` the whole KV pool, `rows` `[T]`
    int32: `block * block_size + offset` of each token, below 0 for tokens that are kept nowhere.
    """
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    _, _, _, block_size, num_kv_heads, dim = pool.shape
    tile = min(8, triton.next_power_of_2(num_kv_heads))
    grid = (num_tokens, triton.cdiv(num_q_heads, tile) + 2 * triton.cdiv(num_kv_heads, tile))
    cos = sin = q_weight = k_weight = qkv  # stands for what is absent
    if rotation is not None:
        cos, sin = rotation.cos, rotation.sin
    if rotation is not None and rotation.q_weight is not None:
        q_weight = rotation.q_weight
    if rotation is not None and rotation.k_weight is not None:
        k_weight = rotation.k_weight
    _store_heads_kernel[grid](
        qkv,
        cos,
        sin,
        q_weight,
        k_weight,
        pool,
        rows,
        qkv.stride(0),
        layer * pool.stride(1),
        pool.stride(0),
        pool.stride(2),
        0.0 if rotation is None else rotation.eps,
        num_q_heads,
        num_kv_heads,
        dim // 2,
        triton.next_power_of_2(dim // 2),
        block_size,
        tile,
        rotation is not None,
        -1 if rotation is None else rotation.norm_style,
        num_warps=2,
    )
