"""What every form of quantized weights has: which tensors make one weight, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from serving.errors import ModelError

# Four bits, E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0).
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FP4 = torch.tensor([*_POSITIVE, *(-number for number in _POSITIVE)])

EXPONENT_BIAS = 127
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

_OF_ACTIVATIONS = {
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "activation_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
}

REMEDY = "fetch or copy the model again"


class PackedPart(NamedTuple):
    """A tensor of a checkpoint as a part of one weight."""

    weight: str
    part: str


class QuantizedForm(ABC):
    """One way to store weights in few bits. `label` is what people call it."""

    label: ClassVar[str]

    @abstractmethod
    def part_of(self, name: str) -> PackedPart | None:
        """What the tensor of this name belongs to, if it is packed; None: it is a weight itself."""

    @abstractmethod
    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        """Whether these parts are a packed weight, and not a plain one."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float32 weight. Raises ModelError, KeyError for a missing part, or RuntimeError."""

    def is_for_activations(self, name: str) -> bool:
        """Whether the tensor scales activations or KV, which are not quantized here."""
        return name.rpartition(".")[2] in _OF_ACTIVATIONS


def by_suffix(name: str, suffixes: Mapping[str, str]) -> PackedPart | None:
    """`X.suffix` is a part of `X.weight`; `suffixes` maps suffixes to the names of parts."""
    module, _, suffix = name.rpartition(".")
    return PackedPart(f"{module}.weight", suffixes[suffix]) if suffix in suffixes else None


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """What a byte stands for as a scale: E8M0 (OCP Microscaling Formats 1.0)."""
    return torch.exp2(exponent.float() - EXPONENT_BIAS)


def fp4_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Float32 `[..., 2 * n]` of bytes `[..., n]`, the lower half of a byte first."""
    low, high = _FP4[(packed & 15).long()], _FP4[(packed >> 4).long()]
    return torch.stack([low, high], dim=-1).flatten(-2)


def integers(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Unsigned int32 `[..., n * 32 / num_bits]` of int32 words `[..., n]`, the lowest bits first.

    Numbers may lie across two words: those of three bits do.
    """
    if 32 % num_bits == 0:
        shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << num_bits) - 1)).flatten(-2)
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    grouped = bits.reshape(*words.shape[:-1], -1, num_bits)
    numbers: torch.Tensor = (grouped << torch.arange(num_bits, dtype=torch.int32)).sum(-1)
    return numbers.int()


def scaled(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """`values` `[..., N, K]` times a scale for all, for each row `[N]`, or for each block.

    Blocks are `block` large, or as large as the shapes say. Scales that are bytes are exponents.
    Raises ModelError where they do not fit.
    """
    scale = power_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.dim() == values.dim() - 1:
        scale = scale.unsqueeze(-1)
    sizes = []
    for axis in (-2, -1):
        size, count = values.shape[axis], scale.shape[axis]
        stated = block[axis] if block is not None and count > 1 else None
        each = stated or -(-size // count)
        if -(-size // each) != count or (stated is None and size % count):
            raise ModelError(
                f"scales of shape {list(scale.shape)} do not fit a weight of {list(values.shape)}",
                remedy=REMEDY,
            )
        sizes.append(each)
    for axis, each in zip((-2, -1), sizes, strict=True):
        if scale.shape[axis] > 1:
            scale = scale.repeat_interleave(each, axis).narrow(axis, 0, values.shape[axis])
    return values * scale
