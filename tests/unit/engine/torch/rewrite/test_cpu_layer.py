"""Layers on CPU are rewritten where they are of the usual shape, and compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving.config import EngineConfig
from serving.engine.torch.attention import PagedStep, SequenceSpan
from serving.engine.torch.cpu import int8_weights
from serving.engine.torch.rewrite.mechanism import decoder_layers
from serving.engine.torch.runner import ModelRunner
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from unit.engine.torch_rig import SIZES, random_prompts, save_model

MORE = {"head_dim": 16}
FAMILIES = {
    "llama": (LlamaConfig(**SIZES), 2),
    "qwen2": (Qwen2Config(**SIZES), 2),
    "qwen3": (Qwen3Config(**SIZES, **MORE), 2),
    "qwen2-window": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1), 2,
    ),
    # Positions are not encoded in one of the layers: that one is left alone.
    "smollm3": (SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), 1),
    "granite": (GraniteConfig(**SIZES, residual_multiplier=0.3), 0),
    "gemma2": (Gemma2Config(**SIZES, **MORE), 0),
    "cohere": (CohereConfig(**SIZES), 0),
    "olmo2": (Olmo2Config(**SIZES), 0),
    "phi": (PhiConfig(**SIZES), 0),
    "qwen3-moe": (
        Qwen3MoeConfig(
            **SIZES, **MORE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_rewritten_where_that_changes_nothing(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, num_rewritten = FAMILIES[family]
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "float", config))
    int8_weights.quantize(model)
    (tmp_path / "int8").mkdir()
    int8_weights.save(model, tmp_path / "int8")
    caplog.set_level("INFO")
    settings = EngineConfig(dtype="int8", block_size=8, max_model_len=64, kv_cache_tokens=256)
    runner = ModelRunner(tmp_path / "int8", settings, "cpu", 64)
    runner.allocate_pool()
    assert f"layer rewrite: {num_rewritten} of 2 layers" in caplog.text
    logits = [runner_logits(runner)]
    for layer in decoder_layers(runner._model):
        vars(layer).pop("forward", None)  # as transformers wrote it
    logits.append(runner_logits(runner))
    assert relative(*logits) < 2e-3


def runner_logits(runner: ModelRunner) -> torch.Tensor:
    """A prefill of 40 tokens and a decode step behind it, with the prefill's rows reported."""
    blocks = list(range(1, 8))
    ids = random_prompts([41])[0]
    with torch.inference_mode():
        prefill = PagedStep(runner.pool, [], [SequenceSpan(blocks, 0, 40)])
        first = runner._compute_rows(ids[:40], list(range(40)), list(range(40)), prefill)
        decode = PagedStep(runner.pool, [SequenceSpan(blocks, 40, 1)], [])
        second = runner._compute_rows(ids[40:], [40], [0], decode)
    return torch.cat([first, second])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
