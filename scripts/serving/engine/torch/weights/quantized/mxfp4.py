"""MXFP4 as gpt-oss comes in it: experts' weights in blocks of 32 four-bit numbers and an exponent.

`X_blocks` is uint8 `[experts, out, in / 32, 16]`, `X_scales` uint8 `[experts, out, in / 32]` with a
bias of 127; `X` is `[experts, in, out]` (OCP Microscaling Formats 1.0; transformers' GptOssExperts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import (
    EXPONENT_BIAS,
    PackedPart,
    QuantizedForm,
    fp4_pairs,
)


class Mxfp4Form(QuantizedForm):
    label = "MXFP4"

    def part_of(self, name: str) -> PackedPart | None:
        for part in ("blocks", "scales"):
            if name.endswith(f"_{part}"):
                return PackedPart(name.removesuffix(f"_{part}"), part)
        return None

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return True

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        values = fp4_pairs(parts["blocks"])
        exponents = parts["scales"].int() - EXPONENT_BIAS
        return torch.ldexp(values, exponents[..., None]).flatten(-2).transpose(1, 2)
