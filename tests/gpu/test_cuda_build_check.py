"""The build's check on a real GPU: kernels, graphs and the layer rewrite of each kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engine.torch.build_check.serving_check import check_small_model
from transformers import CONFIG_MAPPING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 8},
    "qwen3": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen3_moe": {},
    "gemma2": {},
    "gemma3_text": {},
    "gpt_oss": {},
    "phi3": {},
    "smollm3": {},
    "granite": {},
    "olmo3": {},
    "gpt2": {},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_the_engine_on_the_gpu_agrees_with_generate(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type](**MODELS[model_type])
    lines: list[str] = []
    check_small_model(config, tmp_path / "engine", lines.append, device="cuda")
    (line,) = lines
    assert line.startswith("the engine on cuda and `generate` agree")
