"""RMSNorm, alone or together with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# How an RMSNorm rounds: its class decides, the layer rewrite finds out which one it is.
CAST_THEN_SCALE = 0  # weight * normed.to(dtype)
SCALE_THEN_CAST = 1  # (weight * normed).to(dtype), all in float32
ONE_PLUS_WEIGHT = 2  # ((1 + weight) * normed).to(dtype), all in float32
STYLES = (CAST_THEN_SCALE, SCALE_THEN_CAST, ONE_PLUS_WEIGHT)


@triton.jit
def scale_rows(normed, weight, dtype: tl.constexpr, STYLE: tl.constexpr):
    """`normed` times `weight`, rounded as `STYLE` says."""
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
    tl.store(out_ptr + offsets, scale_rows(normed, weight, dtype, STYLE).to(dtype), mask=mask)


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
