"""Records what the formats' own libraries pack and unpack, for `test_recorded.py`.

    pip install compressed-tensors==0.20.1 bitsandbytes==0.50.2
    python tests/unit/engine/torch/weights/quantized/record.py

A case is a packed module `m` and what its library makes of it, on CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import __version__ as transformers_version
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FILE = Path(__file__).parent / "recorded.safetensors"
Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def by_compressed_tensors(format: str, weights: dict[str, Any], **stored: torch.Tensor) -> Case:
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress({"weight": WEIGHT.clone(), **stored}, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": json.loads(arguments.model_dump_json())}},
    }
    unpacked = compressor.decompress(packed, scheme)["weight"].float()
    return config, {f"m.{name}": tensor for name, tensor in packed.items()}, unpacked


def by_bitsandbytes(kind: str, *, nested: bool) -> Case:
    packed, state = bnb.quantize_4bit(
        WEIGHT, quant_type=kind, compress_statistics=nested, blocksize=64
    )
    tensors = {"m.weight": packed}
    tensors |= {f"m.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"quant_method": "bitsandbytes"}, tensors, bnb.dequantize_4bit(packed, state).float()


def by_bitsandbytes_int8() -> Case:
    numbers, largest, _ = bnb.int8_vectorwise_quant(WEIGHT.half())
    tensors = {"m.weight": numbers, "m.SCB": largest, "m.weight_format": torch.zeros((), dtype=torch.uint8)}  # fmt: skip
    unpacked = bnb.int8_vectorwise_dequant(numbers, largest).float()
    return {"quant_method": "bitsandbytes"}, tensors, unpacked


def by_transformers_mxfp4() -> Case:
    blocks = torch.randint(0, 256, (2, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 8, 2), dtype=torch.uint8)
    tensors = {"m.weight_blocks": blocks, "m.weight_scales": scales}
    unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"quant_method": "mxfp4"}, tensors, unpacked


torch.manual_seed(0)
WEIGHT = torch.randn(24, 64)
GROUPS = WEIGHT.unflatten(-1, (-1, 32))
LOW, HIGH = GROUPS.amin(-1).clamp_max(0), GROUPS.amax(-1).clamp_min(0)
STEP = (HIGH - LOW) / 15
INT, FLOAT = {"type": "int", "symmetric": True}, {"type": "float", "symmetric": True}
IN_GROUPS, IN_ROWS = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}
OF_ROWS = WEIGHT.abs().amax(1, keepdim=True)

CASES: dict[str, Case] = {
    "int4": by_compressed_tensors(
        "pack-quantized",
        {**INT, **IN_GROUPS, "num_bits": 4},
        weight_scale=GROUPS.abs().amax(-1) / 7.5,
    ),
    "asymmetric int4": by_compressed_tensors(
        "pack-quantized",
        {**INT, **IN_GROUPS, "num_bits": 4, "symmetric": False},
        weight_scale=STEP,
        weight_zero_point=torch.round(-8 - LOW / STEP).clamp(-8, 7).to(torch.int8),
    ),
    "packed int8": by_compressed_tensors(
        "pack-quantized", {**INT, **IN_ROWS, "num_bits": 8}, weight_scale=OF_ROWS / 127.5
    ),
    "int8": by_compressed_tensors(
        "int-quantized", {**INT, **IN_ROWS, "num_bits": 8}, weight_scale=OF_ROWS / 127.5
    ),
    "FP8 of rows": by_compressed_tensors(
        "float-quantized", {**FLOAT, **IN_ROWS, "num_bits": 8}, weight_scale=OF_ROWS / 448
    ),
    "FP8 of blocks": by_compressed_tensors(
        "float-quantized",
        {**FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [16, 32]},
        weight_scale=torch.rand(2, 2) / 100 + 0.01,
    ),
    "MXFP4 by compressed-tensors": by_compressed_tensors(
        "mxfp4-pack-quantized",
        {**FLOAT, **IN_GROUPS, "num_bits": 4},
        weight_scale=torch.exp2(torch.ceil(torch.log2(GROUPS.abs().amax(-1) / 6))),
    ),
    "MXFP4 by transformers": by_transformers_mxfp4(),
    "bitsandbytes int8": by_bitsandbytes_int8(),
    **{
        f"bitsandbytes {kind}{', nested' if nested else ''}": by_bitsandbytes(kind, nested=nested)
        for kind in ("nf4", "fp4")
        for nested in (False, True)
    },
}

if __name__ == "__main__":
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, str] = {
        "versions": f"compressed-tensors {compressed_tensors.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}, transformers {transformers_version}"
    }
    for case, (config, packed, unpacked) in CASES.items():
        about[case] = json.dumps(config)
        tensors |= {f"{case}/packed/{name}": value.contiguous() for name, value in packed.items()}
        tensors[f"{case}/unpacked"] = unpacked.contiguous()
    save_file(tensors, FILE, metadata=about)
