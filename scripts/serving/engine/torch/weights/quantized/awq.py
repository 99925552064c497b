"""AWQ's four bits (the `gemm` layout): int32 words along the outputs, in an order of their own.

`qweight` `[in, out / 8]`, `qzeros` `[in / group, out / 8]`, `scales` `[in / group, out]`:
`weight = ((q - zero) * scale).T`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import (
    PackedPart,
    QuantizedForm,
    by_suffix,
    integers,
)
from serving.errors import ModelError

_PARTS = {name: name for name in ("qweight", "qzeros", "scales")}
# Where the eight numbers of a word lie in it, from its lowest bits.
_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class AwqForm(QuantizedForm):
    label = "AWQ"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError."""
        num_bits = config.get("bits", config.get("w_bit", 4))
        layout = str(config.get("version", "gemm")).lower()
        if num_bits != 4 or layout != "gemm":
            raise ModelError(
                f"the torch engine reads AWQ weights of 4 bits in the `gemm` layout, not "
                f"{num_bits} bits in `{layout}`",
                remedy="use a copy in that layout, or in GPTQ, FP8 or bfloat16",
            )

    def part_of(self, name: str) -> PackedPart | None:
        return by_suffix(name, _PARTS)

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return True

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values, scales = _in_order(parts["qweight"]), parts["scales"].float()
        group = len(values) // len(scales)
        zeros = _in_order(parts["qzeros"]).repeat_interleave(group, 0)
        return ((values - zeros) * scales.repeat_interleave(group, 0)).T


def _in_order(words: torch.Tensor) -> torch.Tensor:
    return integers(words, 4).view(len(words), -1, 8)[..., _ORDER].flatten(-2)
