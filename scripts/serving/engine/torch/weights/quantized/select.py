"""Which form a checkpoint's weights are quantized in, as its config states it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.engine.torch.weights.quantized.awq import AwqForm
from serving.engine.torch.weights.quantized.base import QuantizedForm
from serving.engine.torch.weights.quantized.bitsandbytes import BitsAndBytesForm
from serving.engine.torch.weights.quantized.compressed_tensors import CompressedTensorsForm
from serving.engine.torch.weights.quantized.fp8 import Fp8Form
from serving.engine.torch.weights.quantized.gptq import GptqForm
from serving.engine.torch.weights.quantized.modelopt import ModelOptForm
from serving.engine.torch.weights.quantized.mxfp4 import Mxfp4Form
from serving.errors import ModelError

SUPPORTED = "MXFP4, FP8, ModelOpt (FP8, NVFP4), compressed-tensors, AWQ, GPTQ and bitsandbytes"


def quantized_form(folder: Path) -> QuantizedForm | None:
    """The form of the weights in `folder`; None: they are not quantized.

    Raises ModelError for a form that cannot be read.
    """
    stated = _stated(folder)
    if stated is None:
        return None
    match method := str(stated.get("quant_method", "an unknown method")).lower():
        case "mxfp4":
            return Mxfp4Form()
        case "fp8" | "fbgemm_fp8":
            return Fp8Form(stated)
        case "modelopt" | "modelopt_fp4":
            return ModelOptForm()
        case "compressed-tensors" | "compressed_tensors":
            return CompressedTensorsForm(stated)
        case "awq":
            return AwqForm(stated)
        case "gptq":
            return GptqForm(stated)
        case "auto-round" if "gptq" in str(stated.get("packing_format", "auto_round:auto_gptq")):
            return GptqForm(stated)
        case "bitsandbytes":
            return BitsAndBytesForm()
    raise ModelError(
        f"the torch engine cannot run this model: its weights are quantized ({method})",
        remedy=f"use a copy in bfloat16, or in one of the forms it reads: {SUPPORTED}",
    )


def _stated(folder: Path) -> Mapping[str, Any] | None:
    config = _json(folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and part.get("quantization_config"):
            stated: Mapping[str, Any] = part["quantization_config"]
            return stated
    # transformers does not read this file of ModelOpt's.
    algorithm = (_json(folder / "hf_quant_config.json").get("quantization") or {}).get("quant_algo")
    return {"quant_method": "modelopt", "quant_algo": algorithm} if algorithm else None


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none. Raises ModelError."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged", remedy="fetch or copy the model again")
    return found
