"""The formats of the compressed-tensors library (llm-compressor), for weights.

FP8 and int8: `weight` and `weight_scale`. Packed integers: `weight_packed` int32, `weight_shape`,
and where they are asymmetric `weight_zero_point`, packed along the rows. Four-bit floats:
`weight_packed` uint8, with `weight_global_scale` for NVFP4. Activations stay floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from serving.engine.torch.weights.quantized.base import (
    PackedPart,
    QuantizedForm,
    by_suffix,
    fp4_pairs,
    integers,
    power_of_two,
    scaled,
)
from serving.errors import ModelError

_PARTS = {
    "weight": "weight",
    "weight_packed": "packed",
    "weight_scale": "scale",
    "weight_zero_point": "zero_point",
    "weight_shape": "shape",
    "weight_g_idx": "group_index",
    "weight_global_scale": "global_scale",
}
_NUM_BITS = {2, 4, 8}
_REMEDY = "use a copy in 4 or 8 bits, FP8 or bfloat16"


class CompressedTensorsForm(QuantizedForm):
    label = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError."""
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense" or config.get("transform_config"):
            what = f"sparse ({sparsity})" if sparsity != "dense" else "transformed (Hadamard)"
            raise ModelError(
                f"the torch engine cannot run this model: its weights are {what} as well as "
                "quantized by compressed-tensors",
                remedy=_REMEDY,
            )
        groups = (config.get("config_groups") or {}).values()
        schemes = [group.get("weights") or {} for group in groups]
        blocks = {tuple(each["block_structure"]) for each in schemes if each.get("block_structure")}
        self._block = (int(min(blocks)[0]), int(min(blocks)[1])) if len(blocks) == 1 else None
        self._bits = {int(each["num_bits"]) for each in schemes if each.get("type") == "int"}

    def part_of(self, name: str) -> PackedPart | None:
        return by_suffix(name, _PARTS)

    def is_packed(self, parts: Mapping[str, Any]) -> bool:
        return "scale" in parts

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = parts["scale"]
        if "packed" not in parts:
            values = parts["weight"].float()
            if "zero_point" in parts:
                values = values - _each_value(parts["zero_point"].float(), values)
            return scaled(values, scale, self._block)
        packed = parts["packed"]
        if packed.dtype == torch.uint8:
            if scale.dtype == torch.uint8:
                scale = power_of_two(scale)
            if "global_scale" in parts:
                scale = scale.float() / parts["global_scale"].float()
            return scaled(fp4_pairs(packed), scale)
        return self._unpack_integers(parts)

    def _unpack_integers(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        packed, scale = parts["packed"], parts["scale"]
        *_, num_rows, num_columns = parts["shape"].tolist()
        num_bits = packed.shape[-1] * 32 // num_columns
        num_bits = min(self._bits) if len(self._bits) == 1 else num_bits
        if num_bits not in _NUM_BITS:
            raise ModelError(
                f"the torch engine reads no packed integers of {num_bits} bits", remedy=_REMEDY
            )
        offset = 1 << (num_bits - 1)
        values = integers(packed, num_bits)[..., :num_columns].float() - offset
        group = parts.get("group_index")
        if "zero_point" in parts:
            zeros = integers(parts["zero_point"].transpose(-1, -2), num_bits)[..., :num_rows]
            zeros = zeros.transpose(-1, -2).float() - offset
            values = values - _each_value(zeros, values, group)
        return values * _each_value(scale.float(), values, group)


def _each_value(
    of_groups: torch.Tensor, values: torch.Tensor, group_index: torch.Tensor | None = None
) -> torch.Tensor:
    """What belongs to a group of columns, for each value of `[..., N, K]`."""
    if of_groups.numel() == 1:
        return of_groups.reshape(())
    if of_groups.dim() == values.dim() - 1:
        of_groups = of_groups.unsqueeze(-1)
    count = of_groups.shape[-1]
    if count == 1:
        return of_groups
    if group_index is not None and bool((group_index >= 0).all()):
        return of_groups[..., group_index.long()]
    return of_groups.repeat_interleave(-(-values.shape[-1] // count), -1)[..., : values.shape[-1]]
