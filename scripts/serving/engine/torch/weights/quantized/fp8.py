"""FP8 weights with a scale for a block, a row or all (DeepSeek V3, Qwen3-FP8, FBGEMM).

`weight` is E4M3; the scale, which multiplies it, is `weight_scale_inv` or `weight_scale`. Fused
experts have them as `X` and `X_scale_inv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import (
    FP8_DTYPES,
    PackedPart,
    QuantizedForm,
    scaled,
)

_SCALES = ("_scale_inv", "weight_scale")


class Fp8Form(QuantizedForm):
    label = "FP8"

    def __init__(self, config: Mapping[str, Any]) -> None:
        size = config.get("weight_block_size")
        self._block = (int(size[0]), int(size[1])) if size else None

    def part_of(self, name: str) -> PackedPart | None:
        for suffix in _SCALES:
            if name.endswith(suffix):
                return PackedPart(name[: name.rindex("_scale")], "scale")
        return PackedPart(name, "weight")

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return "scale" in parts

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight = parts["weight"]
        assert weight.dtype in FP8_DTYPES, weight.dtype
        return scaled(weight.float(), parts["scale"], self._block)
