"""Checkpoints in quantized forms, packed here by the formats' descriptions, without their libraries.

Each form quantizes the linear layers of a float32 folder. `generate` runs on a copy of the folder
with the numbers that the quantized ones stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.models.checkpoint import Checkpoint, Form
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors by their names after the module's, and the weight that they stand for."""
Pack = Callable[[torch.Tensor], Packed]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 16


def quantized(config: Mapping[str, Any], pack: Pack, *, own_file: bool = False) -> Form:
    """`config` is config.json's `quantization_config`, or with `own_file` ModelOpt's file."""

    def apply(folder: Path) -> Checkpoint:
        reference = folder.with_name(f"{folder.name}-unquantized")
        shutil.copytree(folder, reference)
        weights = load_file(folder / "model.safetensors")
        stored, meant = {}, {}
        for name, weight in weights.items():
            module, _, last = name.rpartition(".")
            is_packed_linear = config.get("quant_method") != "mxfp4" and module.endswith("_proj")
            if last == "weight" and is_packed_linear:
                parts, meant[name] = pack(weight)
                of_module = {f"{module}.{part}": value for part, value in parts.items()}
                stored |= {
                    key: value
                    for key, value in of_module.items()
                    if key == name or key not in weights
                }
            elif last in ("gate_up_proj", "down_proj"):  # experts of gpt-oss
                parts, meant[name] = pack(weight)
                stored |= {f"{name}_{part}": value for part, value in parts.items()}
            else:
                stored[name] = meant[name] = weight
        for where, tensors in ((folder, stored), (reference, meant)):
            tensors = {name: value.contiguous() for name, value in tensors.items()}
            save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
        if own_file:
            (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": config}))
        else:
            path = folder / "config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"quantization_config": config})
            )
        return Checkpoint(folder, reference)

    return apply


# --- floats -------------------------------------------------------------------------------------


def _fp8(
    weight: torch.Tensor, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 numbers, a scale for each block of that size, and what they stand for."""
    num_rows, num_columns = (
        -(-n // size) for n, size in zip(weight.shape, (rows, columns), strict=True)
    )
    stored, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(num_rows, num_columns)
    for row in range(num_rows):
        for column in range(num_columns):
            at = (
                slice(row * rows, (row + 1) * rows),
                slice(column * columns, (column + 1) * columns),
            )
            scales[row, column] = scale = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scale).to(torch.float8_e4m3fn)
            meant[at] = stored[at].float() * scale
    return stored, scales, meant


def fp8_blocks(weight: torch.Tensor) -> Packed:
    stored, scales, meant = _fp8(weight, 24, 24)  # the last block of a row is a part of one
    return {"weight": stored, "weight_scale_inv": scales}, meant


def fp8_modelopt(weight: torch.Tensor) -> Packed:
    stored, scales, meant = _fp8(weight, *weight.shape)
    return {"weight": stored, "weight_scale": scales[0, 0], "input_scale": torch.tensor(0.5)}, meant


def fp8_rows(weight: torch.Tensor) -> Packed:
    stored, scales, meant = _fp8(weight, 1, weight.shape[1])
    return {"weight": stored, "weight_scale": scales}, meant


def _fp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of two numbers, the first in the lower half, and the numbers."""
    nearest = np.abs(values[..., None] - FP4).argmin(-1)
    return (nearest[..., 0::2] | nearest[..., 1::2] << 4).astype(np.uint8), FP4[nearest]


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes, the scales of groups of 16 as E4M3, the scale of all, and what they stand for."""
    groups = weight.unflatten(-1, (-1, 16))
    largest = groups.abs().amax(-1)
    of_all = largest.max() / (6 * 448)
    of_groups = (largest / 6 / of_all).to(torch.float8_e4m3fn)
    scale = (of_groups.float() * of_all)[..., None]
    stored, numbers = _fp4((groups / scale.clamp_min(1e-12)).numpy())
    meant = (torch.from_numpy(numbers) * scale).flatten(-2)
    return torch.from_numpy(stored).flatten(-2), of_groups, of_all, meant


def nvfp4_modelopt(weight: torch.Tensor) -> Packed:
    stored, of_groups, of_all, meant = _nvfp4(weight)
    return {"weight": stored, "weight_scale": of_groups, "weight_scale_2": of_all}, meant


def nvfp4_compressed(weight: torch.Tensor) -> Packed:
    stored, of_groups, of_all, meant = _nvfp4(weight)
    return {
        "weight_packed": stored,
        "weight_scale": of_groups,
        "weight_global_scale": 1 / of_all.reshape(1),
    }, meant


def mxfp4(weight: torch.Tensor) -> Packed:
    """Of experts `[E, in, out]`."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 6)).clamp(-127, 127)
    scale = torch.exp2(exponents)[..., None]
    stored, numbers = _fp4((groups / scale).numpy())
    meant = (torch.from_numpy(numbers) * scale).flatten(-2).transpose(1, 2)
    return {
        "blocks": torch.from_numpy(stored),
        "scales": (exponents + 127).to(torch.uint8),
    }, meant


# --- integers -----------------------------------------------------------------------------------


def _groups(weight: torch.Tensor, num_bits: int, *, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Unsigned numbers `[N, K]`, zeros and scales `[N, K / GROUP]` of groups of columns."""
    groups, most = weight.unflatten(-1, (-1, GROUP)), (1 << num_bits) - 1
    if symmetric:
        scale = 2 * groups.abs().amax(-1) / most
        zero = torch.full_like(scale, 1 << (num_bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = (high - low) / most
        zero = torch.round(-low / scale)
    scale = scale.half().float()  # as stored
    numbers = torch.round(groups / scale[..., None] + zero[..., None]).clamp(0, most)
    return numbers.flatten(-2).int(), zero.int(), scale


def _words(numbers: np.ndarray, num_bits: int) -> np.ndarray:
    """A stream of bits along the last axis, in int32 words, the lowest bits first."""
    bits = (numbers[..., None] >> np.arange(num_bits)) & 1
    bits = bits.reshape(*numbers.shape[:-1], -1, 32).astype(np.uint64)
    return (bits << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def _packed(numbers: torch.Tensor, num_bits: int) -> torch.Tensor:
    return torch.from_numpy(_words(numbers.numpy(), num_bits))


def _meant(numbers: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    groups = numbers.unflatten(-1, (-1, GROUP))
    return ((groups - zero[..., None]) * scale[..., None]).flatten(-2)


def awq(weight: torch.Tensor) -> Packed:
    numbers, zero, scale = _groups(weight, 4, symmetric=False)
    # The eight numbers of a word: 0, 2, 4 and 6 first, then 1, 3, 5 and 7.
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(values: torch.Tensor) -> torch.Tensor:
        return _packed(values.T.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    return {
        "qweight": words(numbers),
        "qzeros": words(zero),
        "scales": scale.T.half(),
    }, _meant(numbers, zero, scale)


def gptq(num_bits: int, *, symmetric: bool, in_order: bool, version: int = 1) -> Pack:
    """`in_order`: groups are runs of inputs; else inputs belong to groups by their activations."""

    def pack(weight: torch.Tensor) -> Packed:
        size = weight.shape[1]
        order = torch.arange(size)
        if not in_order:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        numbers, zero, scale = _groups(weight[:, order], num_bits, symmetric=symmetric)
        meant, group = torch.empty_like(weight), torch.empty(size, dtype=torch.int32)
        meant[:, order] = _meant(numbers, zero, scale)
        group[order] = torch.arange(size, dtype=torch.int32) // GROUP
        stored = torch.empty_like(numbers)
        stored[:, order] = numbers
        zeros = (zero - int(version == 1)) & ((1 << num_bits) - 1)
        return {
            "qweight": _packed(stored, num_bits).T,
            "qzeros": _packed(zeros.T.contiguous(), num_bits),
            "scales": scale.T.half(),
            "g_idx": group,
            "bias": torch.zeros(len(weight)),
        }, meant

    return pack


def int4_compressed(*, symmetric: bool) -> Pack:
    def pack(weight: torch.Tensor) -> Packed:
        numbers, zero, scale = _groups(weight, 4, symmetric=symmetric)
        parts = {
            "weight_packed": _packed(numbers, 4),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = _packed(zero.T.contiguous(), 4).T
        return parts, _meant(numbers, zero, scale)

    return pack


def int8_rows(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = torch.round(weight / scale).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers * scale


# --- bitsandbytes -------------------------------------------------------------------------------


def bnb_int8(weight: torch.Tensor) -> Packed:
    largest = weight.abs().amax(1)
    numbers = torch.round(weight * (127 / largest[:, None])).to(torch.int8)
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return parts, numbers * (largest[:, None] / 127)


def bnb_nf4(weight: torch.Tensor) -> Packed:
    """With absolute maxima that are quantized themselves."""
    levels = torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).abs() ** 1.5
    blocks = weight.flatten().view(-1, 64)
    largest = blocks.abs().amax(1)
    offset, codes = largest.mean(), torch.linspace(-1, 1, 256)
    nested_max = torch.stack([part.abs().max() for part in (largest - offset).split(256)])
    of_blocks = nested_max.repeat_interleave(256)[: len(largest)]
    nested = ((largest - offset) / of_blocks)[:, None].sub(codes).abs().argmin(1).to(torch.uint8)
    meant_max = codes[nested.long()] * of_blocks + offset
    nearest = (blocks / meant_max[:, None])[..., None].sub(levels).abs().argmin(-1)
    flat = nearest.flatten()
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": list(weight.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset.item(),
    }
    return {
        "weight": (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": nested,
        "weight.quant_map": levels,
        "weight.nested_absmax": nested_max,
        "weight.nested_quant_map": codes,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }, (levels[nearest] * meant_max[:, None]).view(weight.shape)


def _compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


_GPTQ = {"quant_method": "gptq", "group_size": GROUP}
QUANTIZED_FORMS: dict[str, Form] = {
    "FP8 in blocks": quantized({"quant_method": "fp8", "weight_block_size": [24, 24]}, fp8_blocks),
    "FP8 by FBGEMM": quantized({"quant_method": "fbgemm_fp8"}, fp8_rows),
    "FP8 by ModelOpt": quantized({"quant_algo": "FP8"}, fp8_modelopt, own_file=True),
    "NVFP4 by ModelOpt": quantized({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4_modelopt),
    "MXFP4": quantized({"quant_method": "mxfp4"}, mxfp4),
    "FP8 by compressed-tensors": quantized(_compressed(type="float", num_bits=8), fp8_rows),
    "int8 by compressed-tensors": quantized(_compressed(type="int", num_bits=8), int8_rows),
    "int4 by compressed-tensors": quantized(_compressed(type="int", num_bits=4), int4_compressed(symmetric=True)),
    "asymmetric int4 by compressed-tensors": quantized(
        _compressed(type="int", num_bits=4, symmetric=False), int4_compressed(symmetric=False)
    ),
    "NVFP4 by compressed-tensors": quantized(_compressed(type="float", num_bits=4), nvfp4_compressed),
    "AWQ": quantized({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "GPTQ": quantized(_GPTQ | {"bits": 4}, gptq(4, symmetric=True, in_order=True)),
    "GPTQ, 8 bits in the order of activations": quantized(
        _GPTQ | {"bits": 8, "desc_act": True}, gptq(8, symmetric=False, in_order=False)
    ),
    "GPTQ v2, 3 bits": quantized(
        _GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"},
        gptq(3, symmetric=False, in_order=True, version=2),
    ),
    "bitsandbytes NF4": quantized({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb_nf4),
    "bitsandbytes int8": quantized({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
    "HQQ": quantized({"quant_method": "hqq"}, int8_rows),
}  # fmt: skip
