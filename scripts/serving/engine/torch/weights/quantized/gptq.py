"""GPTQ: int32 words along the inputs; each input belongs to a group that has a zero and a scale.

`qweight` `[in * bits / 32, out]`, `qzeros` `[groups, out * bits / 32]`, `scales` `[groups, out]`,
`g_idx` `[in]`: `weight = ((q - zero) * scale).T`. The first version of the format stores zeros less
one, `gptq_v2` as they are.
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

_PARTS = {name: name for name in ("qweight", "qzeros", "scales", "g_idx")}


class GptqForm(QuantizedForm):
    label = "GPTQ"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError."""
        self._num_bits = int(config.get("bits") or 0)
        form = config.get("checkpoint_format") or "gptq"
        if self._num_bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2"):
            raise ModelError(
                f"the torch engine reads GPTQ weights of 2, 3, 4 or 8 bits in the formats gptq and "
                f"gptq_v2, not {self._num_bits} bits in `{form}`",
                remedy="use a copy in one of these, or in FP8 or bfloat16",
            )
        self._zero_offset = 1 if form == "gptq" else 0

    def part_of(self, name: str) -> PackedPart | None:
        return by_suffix(name, _PARTS)

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return True

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        num_bits, scales = self._num_bits, parts["scales"].float()
        values = integers(parts["qweight"].T.contiguous(), num_bits)  # [out, in]
        zeros = integers(parts["qzeros"], num_bits)[:, : scales.shape[1]]
        zeros = (zeros + self._zero_offset) & ((1 << num_bits) - 1)
        group = parts.get("g_idx")
        if group is None:
            group = torch.arange(values.shape[1]) // -(-values.shape[1] // len(scales))
        return (values - zeros[group.long()].T) * scales[group.long()].T
