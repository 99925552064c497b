"""How a checkpoint is quantized, and whether a version of TensorRT-LLM loads that on a GPU.

Sources: the hardware matrix in its documentation (docs/source/features/quantization.md) and
`load_hf_quant_config` in tensorrt_llm/_torch/model_config.py. Older versions pass over a
`quantization_config` that they do not know, and then read quantized numbers as plain ones; hence
what a version does not know is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from serving.config import TensorRtLlmConfig
from serving.engine.trtllm.versions import Version
from serving.errors import ConfigError, ModelError


class Quantization(Struct, frozen=True):
    """`algorithm` in the library's terms (`FP8`, `NVFP4`, ...), or as the checkpoint calls it when
    it is none of them. `origin` is what wrote it: `modelopt` or a `quant_method`."""

    algorithm: str
    origin: str
    kv_algorithm: str | None = None


class _Needs(Struct, frozen=True):
    """Compute capabilities from `lowest` to `highest`; 90 is 9.0 (Hopper)."""

    lowest: int
    highest: int = 999


HARDWARE: Mapping[str, _Needs] = {
    "FP8": _Needs(89),
    "FP8_BLOCK_SCALES": _Needs(90, 103),
    "FP8_PER_CHANNEL_PER_TOKEN": _Needs(90, 90),
    "NVFP4": _Needs(100),
    "MXFP4": _Needs(90),
    "W4A16_AWQ": _Needs(80, 90),
    "W4A8_AWQ": _Needs(89, 90),
    "W4A16_GPTQ": _Needs(80, 90),
    "MIXED_PRECISION": _Needs(89),
}

ORIGINS: Mapping[str, tuple[int, int]] = {
    "modelopt": (1, 0),  # hf_quant_config.json
    "fp8": (1, 0),
    "mxfp4": (1, 1),
    "modelopt (in config.json)": (1, 3),
    "compressed-tensors": (1, 3),
}
"""The release line from which the PyTorch backend reads what each of these wrote."""

_KV_NEEDS = {"fp8": _Needs(80), "nvfp4": _Needs(100)}
BF16_NEEDS = 80


def read_quantization(folder: Path, config: Mapping[str, Any]) -> Quantization | None:
    """From hf_quant_config.json, else from `quantization_config` in config.json."""
    path = folder / "hf_quant_config.json"
    if path.exists():
        try:
            stated = json.loads(path.read_bytes())["quantization"]
        except (ValueError, KeyError, TypeError) as exc:
            raise ModelError(f"{path} is damaged", remedy="fetch or copy the model again") from exc
        return _modelopt(stated, "modelopt")
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method", "unknown"))
    if method == "modelopt" or "quant_algo" in stated:
        return _modelopt(stated, "modelopt (in config.json)")
    if method == "fp8" and stated.get("weight_block_size") == [128, 128]:
        return Quantization("FP8_BLOCK_SCALES", "fp8")
    if method == "mxfp4":
        return Quantization("MXFP4", "mxfp4")
    if method == "compressed-tensors":
        names = {"float-quantized": "FP8", "nvfp4-pack-quantized": "NVFP4"}
        style = str(stated.get("format", "unknown"))
        return Quantization(names.get(style, style), method)
    return Quantization(method, method)


def _modelopt(stated: Mapping[str, Any], origin: str) -> Quantization | None:
    algorithm, kv = stated.get("quant_algo"), stated.get("kv_cache_quant_algo")
    if algorithm is None and kv is None:
        return None
    return Quantization(str(algorithm or "FP8"), origin, str(kv) if kv else None)


def require_quantization(
    quantization: Quantization | None, *, version: Version, capabilities: Sequence[int]
) -> None:
    """Raises ModelError when `version` cannot read it, or a GPU cannot compute with it.

    `capabilities` are those of the GPUs that are known, none of them means: not asked.
    """
    if quantization is None:
        return
    algorithm, origin = quantization.algorithm, quantization.origin
    since, needs = ORIGINS.get(origin), HARDWARE.get(algorithm)
    if since is None or needs is None or since > version.line:
        later = f"; {since[0]}.{since[1]} does" if since and needs else ""
        raise ModelError(
            f"TensorRT-LLM {version} does not load weights quantized as {algorithm} by {origin}"
            f"{later}",
            remedy="choose the unquantized model, or one quantized by ModelOpt to FP8, NVFP4 or "
            "W4A16_AWQ",
        )
    for sm in capabilities:
        if not needs.lowest <= sm <= needs.highest:
            bounds = f"{_dotted(needs.lowest)} or newer"
            if needs.highest < 999:
                bounds = f"{_dotted(needs.lowest)} to {_dotted(needs.highest)}"
            raise ModelError(
                f"weights quantized as {algorithm} need GPUs of compute capability {bounds}, and "
                f"there is one of {_dotted(sm)}",
                remedy="choose another quantization of the model, or its unquantized original",
            )


def require_kv_dtype(config: TensorRtLlmConfig, capabilities: Sequence[int]) -> None:
    """Raises ConfigError when a GPU has no such KV dtype."""
    needs = _KV_NEEDS.get(config.kv_cache_dtype)
    for sm in capabilities if needs else ():
        assert needs is not None, "no loop without needs"
        if sm < needs.lowest:
            raise ConfigError(
                "tensorrt_llm.kv_cache_dtype",
                f"{config.kv_cache_dtype} needs GPUs of compute capability "
                f"{_dotted(needs.lowest)} or newer, and there is one of {_dotted(sm)}",
                remedy="set it to `auto`" + (" or `fp8`" if sm >= 80 else ""),
            )


def require_dtype(dtype: str, capabilities: Sequence[int]) -> None:
    """Raises ConfigError when a GPU is too old for bfloat16."""
    for sm in capabilities:
        if dtype == "bfloat16" and sm < BF16_NEEDS:
            raise ConfigError(
                "engine.dtype",
                f"bfloat16 needs GPUs of compute capability {_dotted(BF16_NEEDS)} or newer, and "
                f"there is one of {_dotted(sm)}",
                remedy="set it to `float16`",
            )


def _dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"
