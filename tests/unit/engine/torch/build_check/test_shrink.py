"""A small model keeps every feature of its config."""

from __future__ import annotations

from typing import Any

import torch
from serving.engine.torch.build_check.shrink import VOCAB_SIZE, WINDOW, shrink
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


def small(model_type: str, **values: Any) -> Any:
    return shrink(CONFIG_MAPPING[model_type](**values))


def num_weights(config: Any) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_shrink_and_features_stay() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = small(
        "llama", num_key_value_heads=8, attention_bias=True, rope_parameters=rope,
        max_position_embeddings=131072,
    )  # fmt: skip
    assert num_weights(config) < 10_000_000
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 128)
    assert (config.vocab_size, config.num_hidden_layers) == (VOCAB_SIZE, 2)
    assert config.attention_bias
    assert config.rope_parameters == rope
    assert config.max_position_embeddings == 131072


def test_a_layer_of_every_kind_stays() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = small("gemma3_text", num_hidden_layers=30, layer_types=kinds * 5)
    assert config.layer_types == kinds
    assert config.sliding_window == WINDOW
    late = small("qwen2", num_hidden_layers=28, use_sliding_window=True, max_window_layers=21)
    assert set(late.layer_types) == {"full_attention", "sliding_attention"}
    assert late.num_hidden_layers == len(late.layer_types) < 10


def test_experts_and_their_groups_stay_consistent() -> None:
    config = small("glm4_moe", n_routed_experts=160, num_experts_per_tok=8, first_k_dense_replace=3)
    assert config.n_routed_experts == 16
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 2)


def test_layers_that_are_counted_twice_stay_consistent() -> None:
    """Each of LongCat's layers attends twice; its config counts both."""
    config = small("longcat_flash")
    assert (config.num_layers, config.num_hidden_layers) == (1, 2)


def test_width_that_is_not_that_of_the_heads_stays_so() -> None:
    config = small("qwen3", hidden_size=1024, num_attention_heads=16, head_dim=128)
    assert config.hidden_size != config.num_attention_heads * config.head_dim
