"""bitsandbytes: NF4 and FP4 in blocks with a largest number each, and int8 with one for each row.

Four bits: `weight` uint8, two numbers a byte, the first in the upper half; `weight.absmax` for each
block, itself quantized where `weight.nested_absmax` is there; `weight.quant_state.*` is JSON. Int8:
`weight` and `SCB`, the largest number of each row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import PackedPart, QuantizedForm
from serving.errors import ModelError

_NAME = re.compile(
    r"(?P<weight>.*\.weight)\.(?:(?P<part>absmax|quant_map|nested_absmax|nested_quant_map)"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
_INT8_PARTS = {".SCB": "row_max", ".weight_format": "layout"}


class BitsAndBytesForm(QuantizedForm):
    label = "bitsandbytes"

    def part_of(self, name: str) -> PackedPart | None:
        if found := _NAME.fullmatch(name):
            return PackedPart(found["weight"], found["part"] or "state")
        for suffix, part in _INT8_PARTS.items():
            if name.endswith(suffix):
                return PackedPart(f"{name.removesuffix(suffix)}.weight", part)
        return PackedPart(name, "weight") if name.endswith(".weight") else None

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return len(parts) > 1

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "row_max" in parts:
            if int(parts.get("layout", torch.zeros(()))):
                raise ModelError(
                    "bitsandbytes stored int8 weights in a layout of one GPU generation",
                    remedy="save the model again with a newer bitsandbytes",
                )
            return parts["weight"].float() * (parts["row_max"].float()[:, None] / 127)
        state = json.loads(bytes(parts["state"].tolist()))
        largest = parts["absmax"].float()
        if "nested_absmax" in parts:
            size = state["nested_blocksize"]
            of_blocks = parts["nested_absmax"].float().repeat_interleave(size)[: len(largest)]
            largest = parts["nested_quant_map"].float()[parts["absmax"].long()] * of_blocks
            largest = largest + state["nested_offset"]
        packed = parts["weight"].flatten()
        numbers = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().long()
        shape = torch.Size(state["shape"])
        values = parts["quant_map"].float()[numbers][: shape.numel()]
        return (values * largest.repeat_interleave(state["blocksize"])[: len(values)]).view(shape)
