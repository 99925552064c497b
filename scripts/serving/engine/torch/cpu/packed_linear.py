"""Linear layers with weights laid out for the CPU: about twice as fast at decode batch sizes.

A plain `nn.Linear` on CPU repacks its weight in every call, which dominates when few tokens share
it. Packing once (oneDNN's own blocked order) removes that. For a single token even that has a
noticeable cost per call, and a column-major copy is read faster (1.4x of plain, 1.2x of packed);
it is made where memory is plentiful. Layers that read the same input are joined. The plain weight
goes, except where a tied embedding still needs it.

Int8 weights stay as they are where the engine has compiled kernels; without them they are packed in
FBGEMM's order, and where there is no FBGEMM either, widened to float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.functional import linear as plain_linear

from serving.engine.torch.cpu.int8_weights import Int8Linear
from serving.engine.torch.cpu.kernels import CpuKernels
from serving.host_memory import host_memory

log = logging.getLogger(__name__)

# The row count that oneDNN optimises the blocked order for; measured best over 1..512 rows.
_ROWS_HINT = 16

# The column-major copies may take this share of the memory that is available.
_COPY_SHARE = 0.1

# Children of one module that transformers' models call one after the other on one input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Where a CPU has no VNNI, FBGEMM adds pairs of products in 16 bits, and saturates. With activations
# of at most 63 around a zero point of 64 it cannot: 2 * (63 + 64) * 127 < 2**15.
_HALF_RANGE = 63
_ZERO_POINT = 64
_TINY = 1e-30

Pack = Callable[[list[nn.Linear | Int8Linear]], nn.Module]


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

    @property
    def weight(self) -> torch.Tensor:
        """Unpacked anew each time; some routers look at the type of theirs."""
        plain: torch.Tensor = self._packed.to_dense()
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] == 0:  # a step in which no sequence samples has no rows for the head
            return x.new_empty((*x.shape[:-1], self.out_features))
        if self._column_major is not None and x.shape[-2] == 1:
            return plain_linear(x, self._column_major, self._bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return out


class PackedInt8Linear(nn.Module):
    """`x @ (scale * int8).T + bias` on x86, in integers: float32 in, float32 out.

    Language models have activations that one 8-bit scale per token cannot hold (with a scale per
    tensor, SmolLM2-135M chooses another token at every second position). So each row of `x` is
    split into two 7-bit planes, `unit * (high + low / 126)`, which are multiplied together: the
    weights are read once for both. What is left of the activation's error is below 0.01% of the
    row's largest value, and no row's result depends on another's.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """`weight` is int8 `[out_features, in_features]`, `scale` float32 `[out_features]`."""
        super().__init__()
        self.out_features, self._in_features = weight.shape
        self._bias = bias
        self._tiny = torch.tensor(_TINY)
        self._multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        zero_points = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # The only way to FBGEMM's packed weights goes through a type that torch will drop.
            warnings.simplefilter("ignore")
            typed = torch._make_per_channel_quantized_tensor(
                weight.contiguous(), scale.double(), zero_points, 0
            )
            self._packed = torch.ops.quantized.linear_prepack(typed, None)

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedLinear.weight`."""
        typed, _ = torch.ops.quantized.linear_unpack(self._packed)
        plain: torch.Tensor = typed.dequantize()
        return plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self._in_features)
        num_rows = len(rows)
        if num_rows == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
        unit = torch.add(self._tiny, largest, alpha=1 / _HALF_RANGE)
        planes = rows.new_empty((2 * num_rows, self._in_features))
        high = torch.mul(rows, unit.reciprocal(), out=planes[:num_rows])
        low = torch.sub(high, high.round(), out=planes[num_rows:])
        low.mul_(2 * _HALF_RANGE)
        products = self._multiply(planes, 1.0, _ZERO_POINT, self._packed)
        out = torch.add(products[:num_rows], products[num_rows:], alpha=1 / (2 * _HALF_RANGE))
        out.mul_(unit)
        if self._bias is not None:
            out.add_(self._bias)
        return out.view(*x.shape[:-1], self.out_features)


class KernelLinear(nn.Module):
    """A linear layer of the compiled kernels, over int8 weights as they are stored."""

    def __init__(
        self,
        kernels: CpuKernels,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.out_features, self._in_features = weight.shape
        self._multiply, self._bias = kernels.linear, bias
        self._weight, self._scale = weight.contiguous(), scale.contiguous()

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedLinear.weight`."""
        return self._weight.float() * self._scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self._in_features).contiguous()
        out = self._multiply(rows, self._weight, self._scale, self._bias)
        return out.view(*x.shape[:-1], self.out_features)


class Siblings:
    """Several linears packed as one; the outputs for one input are computed once and split."""

    def __init__(self, linears: list[nn.Linear | Int8Linear], pack: Pack) -> None:
        self.joint = pack(linears)
        self._sizes = [linear.out_features for linear in linears]
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def split(self, joint: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """What belongs to each of the linears, of something that all of them share."""
        return torch.split(joint, self._sizes, dim)

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        # Identity is safe: the input is kept alive until its last part is taken.
        if x is not self._input or index not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self.split(self.joint(x), dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part


class SiblingLinear(nn.Module):
    """One of the linears of `Siblings`, under its old name in the model."""

    def __init__(self, siblings: Siblings, index: int, out_features: int) -> None:
        super().__init__()
        self.siblings, self.index, self.out_features = siblings, index, out_features

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedLinear.weight`."""
        joint: Any = self.siblings.joint
        return self.siblings.split(joint.weight, dim=0)[self.index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.part(self.index, x)


def can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch, device and dtype have packed weights that pay."""
    has_op = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_op and device == "cpu" and dtype == torch.float32


def can_pack_int8() -> bool:
    """Whether this torch multiplies int8 weights on this CPU; else they are widened to float32."""
    return (
        "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
        and hasattr(torch, "_make_per_channel_quantized_tensor")
    )


def pack_linears(model: nn.Module, kernels: CpuKernels | None = None) -> int:
    """Replace every plain `nn.Linear` and `Int8Linear` in place; returns how many there were.

    `kernels` multiply int8 weights; without them torch's libraries do.
    """
    linears = [module for module in model.modules() if _is_plain(module)]
    if kernels is None and any(type(module) is Int8Linear for module in linears):
        if can_pack_int8():
            # FBGEMM's packing reads it; other engines here cannot multiply float32 by int8.
            torch.backends.quantized.engine = "fbgemm"
        else:
            log.warning("this CPU has no FBGEMM: int8 weights are widened to float32")
    num_bytes = sum(linear.weight.nbytes for linear in linears)
    copies = num_bytes < host_memory().available * _COPY_SHARE

    def pack(linears: list[nn.Linear | Int8Linear]) -> nn.Module:
        return _packed(linears, kernels, copies=copies)

    for parent in list(model.modules()):
        for names in _SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            plain = [child for child in children if _is_plain(child)]
            if len(plain) == len(names) and _are_joinable(plain):
                siblings = Siblings(plain, pack)
                for index, name in enumerate(names):
                    linear = SiblingLinear(siblings, index, plain[index].out_features)
                    setattr(parent, name, linear)
        for name, child in list(parent.named_children()):
            if _is_plain(child):
                setattr(parent, name, pack([child]))
    return len(linears)


def _is_plain(module: object) -> TypeGuard[nn.Linear | Int8Linear]:
    return type(module) in (nn.Linear, Int8Linear)


def _packed(
    linears: list[nn.Linear | Int8Linear], kernels: CpuKernels | None, *, copies: bool
) -> nn.Module:
    """One layer with the outputs of all, one after the other."""
    biases: list[torch.Tensor] = [x.bias for x in linears if x.bias is not None]
    bias = torch.cat(biases) if biases else None
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if int8 and (kernels is not None or can_pack_int8()):
        # A lone layer keeps its tensor, which a tied embedding may share.
        weight = torch.cat([x.weight for x in int8]) if len(int8) > 1 else int8[0].weight
        scale = torch.cat([linear.scale for linear in int8])
        if kernels is not None:
            return KernelLinear(kernels, weight, scale, bias)
        return PackedInt8Linear(weight, scale, bias)
    weights = [x.plain_weight() if isinstance(x, Int8Linear) else x.weight for x in linears]
    return PackedLinear(torch.cat(weights), bias, for_single_rows=copies)


def _are_joinable(linears: list[nn.Linear | Int8Linear]) -> bool:
    same_kind = len({type(linear) for linear in linears}) == 1
    same_input = len({linear.in_features for linear in linears}) == 1
    same_bias = len({linear.bias is None for linear in linears}) == 1
    return same_kind and same_input and same_bias
