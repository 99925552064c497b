"""Linear layers with weights laid out for the CPU: about twice as fast at decode batch sizes.

A plain `nn.Linear` on CPU repacks its weight in every call, which dominates when few tokens share
it. Packing once (oneDNN's own blocked order) removes that. For a single token even that has a
noticeable cost per call, and a column-major copy is read faster (1.4x of plain, 1.2x of packed);
it is made where memory is plentiful. Layers that read the same input are joined. The plain weight
goes, except where a tied embedding still needs it.
"""

from __future__ import annotations

import psutil
import torch
from torch import nn
from torch.nn.functional import linear as plain_linear

# The row count that oneDNN optimises the blocked order for; measured best over 1..512 rows.
_ROWS_HINT = 16

# The column-major copies may take this share of the memory that is available.
_COPY_SHARE = 0.1

# Children of one module that transformers' models call one after the other on one input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for float32 on CPU, inference only."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, for_single_rows: bool
    ) -> None:
        """`weight` is `[out_features, in_features]`; `for_single_rows` keeps a second copy."""
        super().__init__()
        weight = weight.detach()
        self.out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._column_major = weight.t().contiguous().t() if for_single_rows else None
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] == 0:  # a step in which no sequence samples has no rows for the head
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self._column_major is not None and x.shape[-2] == 1:
            return plain_linear(x, self._column_major, self._bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return out


class _Siblings:
    """Several linears packed as one; the outputs for one input are computed once and split."""

    def __init__(self, linears: list[nn.Linear], *, for_single_rows: bool) -> None:
        biases: list[torch.Tensor] = [x.bias for x in linears if x.bias is not None]
        weights: list[torch.Tensor] = [x.weight for x in linears]
        self._joint = PackedLinear(
            torch.cat(weights),
            torch.cat(biases) if biases else None,
            for_single_rows=for_single_rows,
        )
        self._sizes = [linear.out_features for linear in linears]
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        # Identity is safe: the input is kept alive until its last part is taken.
        if x is not self._input or index not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self._joint(x).split(self._sizes, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part


class _SiblingLinear(nn.Module):
    """One of the linears of `_Siblings`, in its old place."""

    def __init__(self, siblings: _Siblings, index: int) -> None:
        super().__init__()
        self._siblings, self._index = siblings, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._siblings.part(self._index, x)


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch, device and dtype have packed weights that pay."""
    has_op = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_op and device == "cpu" and dtype == torch.float32


def pack_linears(model: nn.Module) -> int:
    """Replace every plain `nn.Linear` in place; returns how many there were."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    num_bytes = sum(linear.weight.nbytes for linear in linears)
    copies = num_bytes < psutil.virtual_memory().available * _COPY_SHARE
    for parent in list(model.modules()):
        for names in _SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            plain = [child for child in children if type(child) is nn.Linear]
            if len(plain) == len(names) and _are_joinable(plain):
                siblings = _Siblings(plain, for_single_rows=copies)
                for index, name in enumerate(names):
                    setattr(parent, name, _SiblingLinear(siblings, index))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = PackedLinear(child.weight, child.bias, for_single_rows=copies)
                setattr(parent, name, packed)
    return len(linears)


def _are_joinable(linears: list[nn.Linear]) -> bool:
    same_input = len({linear.in_features for linear in linears}) == 1
    same_bias = len({linear.bias is None for linear in linears}) == 1
    return same_input and same_bias
