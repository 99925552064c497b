"""The gated activation of an MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
