"""What a checkpoint says of its quantization, and who can compute with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.config import TensorRtLlmConfig
from serving.engine.trtllm.build.quantization import (
    Quantization,
    read_quantization,
    require_dtype,
    require_kv_dtype,
    require_quantization,
)
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError, ModelError


def require(quantization: Quantization | None, version: str = "1.2.1", *sm: int) -> None:
    require_quantization(quantization, version=parse_version(version), capabilities=sm)


def test_modelopt_quantization_is_read_from_its_own_file(tmp_path: Path) -> None:
    stated = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    assert read_quantization(tmp_path, {}) == Quantization("NVFP4", "modelopt", "FP8")
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ModelError, match="damaged"):
        read_quantization(tmp_path, {})


@pytest.mark.parametrize(
    ("stated", "algorithm", "origin"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8_BLOCK_SCALES", "fp8"),
        ({"quant_method": "fp8"}, "fp8", "fp8"),
        ({"quant_method": "mxfp4"}, "MXFP4", "mxfp4"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            "FP8",
            "modelopt (in config.json)",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "FP8",
            "compressed-tensors",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "pack-quantized",
            "compressed-tensors",
        ),
        ({"quant_method": "awq", "bits": 4}, "awq", "awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes", "bitsandbytes"),
    ],
)
def test_config_json_names_a_method(
    stated: dict[str, Any], algorithm: str, origin: str, tmp_path: Path
) -> None:
    found = read_quantization(tmp_path, {"quantization_config": stated})
    assert found == Quantization(algorithm, origin)


def test_plain_weights_are_not_quantized(tmp_path: Path) -> None:
    assert read_quantization(tmp_path, {}) is None
    require(None, "1.0.0", 70)


@pytest.mark.parametrize(
    ("quantization", "version", "fits"),
    [
        (Quantization("FP8", "modelopt"), "1.0.0", True),
        (Quantization("FP8_BLOCK_SCALES", "fp8"), "1.0.0", True),
        (Quantization("fp8", "fp8"), "1.3.0", False),  # per tensor: read as plain numbers
        (Quantization("MXFP4", "mxfp4"), "1.0.0", False),
        (Quantization("MXFP4", "mxfp4"), "1.1.0", True),
        (Quantization("FP8", "compressed-tensors"), "1.2.1", False),
        (Quantization("FP8", "compressed-tensors"), "1.3.0rc27", True),
        (Quantization("awq", "awq"), "1.3.0rc27", False),
        (Quantization("INT3", "modelopt"), "1.3.0rc27", False),
    ],
)
def test_version_must_support_the_quantization(
    quantization: Quantization, version: str, fits: bool
) -> None:
    if fits:
        require(quantization, version)
    else:
        with pytest.raises(ModelError, match="does not load weights quantized as"):
            require(quantization, version)


@pytest.mark.parametrize(
    ("algorithm", "sm", "fits"),
    [
        ("FP8", 80, False),
        ("FP8", 89, True),
        ("FP8", 120, True),
        ("FP8_BLOCK_SCALES", 89, False),
        ("FP8_BLOCK_SCALES", 90, True),
        ("NVFP4", 90, False),
        ("NVFP4", 100, True),
        ("W4A16_AWQ", 80, True),
        ("W4A16_AWQ", 100, False),
    ],
)
def test_gpu_must_support_the_quantization(algorithm: str, sm: int, fits: bool) -> None:
    quantization = Quantization(algorithm, "modelopt")
    if fits:
        require(quantization, "1.2.1", sm)
    else:
        with pytest.raises(ModelError, match=rf"there is one of {sm // 10}\.{sm % 10}"):
            require(quantization, "1.2.1", sm)


def test_kv_dtype_needs_its_gpu() -> None:
    require_kv_dtype(TensorRtLlmConfig(), [70])
    require_kv_dtype(TensorRtLlmConfig(kv_cache_dtype="fp8"), [80, 90])
    with pytest.raises(ConfigError) as caught:
        require_kv_dtype(TensorRtLlmConfig(kv_cache_dtype="nvfp4"), [90, 100])
    assert caught.value.key == "tensorrt_llm.kv_cache_dtype"
    assert "`auto` or `fp8`" in caught.value.remedy


def test_bfloat16_needs_ampere() -> None:
    require_dtype("bfloat16", [80])
    require_dtype("float16", [75])
    with pytest.raises(ConfigError, match=r"7\.5") as caught:
        require_dtype("bfloat16", [75])
    assert caught.value.key == "engine.dtype"
