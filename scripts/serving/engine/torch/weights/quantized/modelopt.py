"""NVIDIA ModelOpt's FP8 and NVFP4, as hf_quant_config.json or config.json states them.

FP8: `weight` E4M3, `weight_scale` for all, a row or a block. NVFP4: `weight` uint8 `[N, K / 2]`,
`weight_scale` E4M3 `[N, K / 16]`, `weight_scale_2` for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import (
    FP8_DTYPES,
    PackedPart,
    QuantizedForm,
    by_suffix,
    fp4_pairs,
    scaled,
)
from serving.errors import ModelError

_PARTS = {"weight": "weight", "weight_scale": "scale", "weight_scale_2": "global_scale"}


class ModelOptForm(QuantizedForm):
    label = "ModelOpt"

    def part_of(self, name: str) -> PackedPart | None:
        return by_suffix(name, _PARTS)

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return "scale" in parts

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight, scale = parts["weight"], parts["scale"]
        if weight.dtype in FP8_DTYPES:
            return scaled(weight.float(), scale)
        if weight.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
            return scaled(fp4_pairs(weight), scale.float() * parts["global_scale"].float())
        raise ModelError(
            f"ModelOpt stored a weight as {weight.dtype} with scales of {scale.dtype}, which is "
            "neither FP8 nor NVFP4",
            remedy="use a copy in FP8, NVFP4 or bfloat16, or `engine.backend: tensorrt_llm` on GPUs",
        )
