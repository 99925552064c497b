"""Which models are refused, and why."""

from typing import Any

import pytest
from serving.engine.torch.weights.context import model_max_len
from serving.engine.torch.weights.supported import (
    refusal,
    require_supported,
)
from serving.errors import ModelError
from transformers import CONFIG_MAPPING


def config(model_type: str, **values: Any) -> Any:
    return CONFIG_MAPPING[model_type](**values)


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt2",
        "gpt_oss",
        "olmo2",
        "granite",
        "smollm3",
        "cohere2",
        "mixtral",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe_lite",
        "minicpm3",
        "longcat_flash",
    ],
)
def test_models_with_plain_or_latent_kv_are_accepted(model_type: str) -> None:
    assert refusal(config(model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("deepseek_v32", {}, "sparse_attention"),
        ("glm_moe_dsa", {"layer_types": None}, "indexer|sparse"),
        ("kimi_linear", {}, "linear_attention"),
        (
            "minicpm3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 16,
                    "long_factor": [2.0] * 16,
                    "original_max_position_embeddings": 32768,
                }
            },
            "state no `factor`",
        ),
        ("mamba", {}, "state"),
        ("jamba", {}, "state"),
        ("qwen3_next", {}, "linear_attention"),
        ("recurrent_gemma", {}, "recurrent"),
        ("llama", {"cla_share_factor": 2}, "share the KV"),
        ("t5", {}, "encoder-decoder"),
        ("bert", {}, "both ways"),
        ("bloom", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("llava", {}, "multimodal"),
        ("stablelm", {}, "of its own"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "Classification"),
    ],
)
def test_models_that_cannot_run_exactly_are_refused(
    model_type: str, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as failure:
        require_supported(config(model_type, **values))
    assert failure.value.remedy


def test_rotary_positions_of_one_layer_type_are_enough_to_refuse() -> None:
    plain = config("gemma3_text")
    plain.rope_parameters = {
        "full_attention": {"rope_type": "spiral", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert "spiral" in str(refusal(plain))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
    "original_max_position_embeddings": 4096,
}


def test_longrope_is_exact_up_to_its_original_length() -> None:
    plain = config("phi3", max_position_embeddings=131072, rope_parameters=LONGROPE)
    assert refusal(plain) is None
    assert model_max_len(plain) == 4096


def test_dynamic_positions_are_exact_up_to_the_models_length() -> None:
    plain = config(
        "llama",
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    assert refusal(plain) is None
    assert model_max_len(plain) == 4096


def test_hybrid_family_is_accepted_where_all_layers_attend() -> None:
    layers = {"num_hidden_layers": 4, "num_local_experts": 0}
    micro = config("granitemoehybrid", layer_types=["attention"] * 4, **layers)
    assert refusal(micro) is None
    assert "linear_attention" in str(refusal(config("granitemoehybrid", **layers)))
