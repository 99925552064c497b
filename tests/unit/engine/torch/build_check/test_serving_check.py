"""The engine against `generate` at build: what agrees, and what is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engine.torch import attention
from serving.engine.torch.build_check.serving_check import (
    check_real_model,
    check_small_model,
    real_references,
)
from serving.errors import ModelError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from unit.engine.torch_rig import SIZES, random_prompts, save_model


def config(model_type: str, **values: Any) -> Any:
    return CONFIG_MAPPING[model_type](**values)


def check(model_config: Any, tmp_path: Path) -> list[str]:
    lines: list[str] = []
    check_small_model(model_config, tmp_path / "engine", lines.append)
    return lines


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}

# Full-size configs: what is checked is a small model of the same features.
EXACT = {
    "llama with scaled rope": config(
        "llama",
        num_key_value_heads=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    ),
    "windows in some layers only": config("gemma2"),
    "mask of phimoe": config("phimoe", sliding_window=256),
    "mask of qwen2_moe": config(
        "qwen2_moe", use_sliding_window=True, max_window_layers=2, num_hidden_layers=4
    ),
    "arguments that do not reach layers": config("nemotron", num_key_value_heads=8),
    "longrope": config("phi3", max_position_embeddings=131072, rope_parameters=LONGROPE),
    "dynamic rope": config(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    "hybrid family without states": config(
        "granitemoehybrid",
        num_hidden_layers=4,
        num_local_experts=0,
        layer_types=["attention"] * 4,
        position_embedding_type="rope",
    ),
    "router that looks at its weight": config("hunyuan_v1_moe", head_dim=64),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_engine_agrees_with_generate(name: str, tmp_path: Path) -> None:
    (line,) = check(EXACT[name], tmp_path)
    assert "agree" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("doge", {}, "layers change the mask"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "lets a token see later ones"),
        ("diffllama", {}, "layer 0 attends more than once"),
        ("hrm_text", {}, "layer 0 attends more than once"),
    ],
)
def test_attention_that_is_not_paged_is_refused_with_the_reason(
    model_type: str, values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as failure:
        check(config(model_type, **values), tmp_path)
    assert "tensorrt_llm" in failure.value.remedy
    assert list(tmp_path.iterdir()) == []


def _without_window(options: attention.AttentionOptions) -> attention.AttentionOptions:
    return options._replace(window=None)


def _without_softcap(options: attention.AttentionOptions) -> attention.AttentionOptions:
    return options._replace(softcap=None)


def _scaled_otherwise(options: attention.AttentionOptions) -> attention.AttentionOptions:
    return options._replace(scaling=options.scaling * 1.05)


@pytest.mark.parametrize("fault", [_without_window, _without_softcap, _scaled_otherwise])
def test_an_engine_that_drops_an_option_is_refused(
    fault: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = attention.PagedStep.attend

    def faulty(
        self: Any, layer: int, query: Any, key: Any, value: Any, options: Any
    ) -> torch.Tensor:
        return attend(self, layer, query, key, value, fault(options))

    monkeypatch.setattr(attention.PagedStep, "attend", faulty)
    with pytest.raises(ModelError, match="would not compute this model as transformers does"):
        check(config("gemma2"), tmp_path)


def test_real_weights_that_are_not_the_checked_ones_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "a", LlamaConfig(**SIZES))
    other = save_model(tmp_path / "b", LlamaConfig(**SIZES), seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    references = real_references(model, random_prompts([20, 3]))
    lines: list[str] = []
    check_real_model(folder, "float32", references, lines.append)
    assert "agree on 2 prompts" in lines[0]
    with pytest.raises(ModelError, match="prompt 1, token 1 of the answer"):
        check_real_model(other, "float32", references, lines.append)
