"""Which models are refused, and why."""

from typing import Any

import pytest
from serving.engine.torch.weights.supported import refusal, require_supported
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
    ],
)
def test_models_with_plain_kv_are_accepted(model_type: str) -> None:
    assert refusal(config(model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("deepseek_v3", {}, "latent"),
        ("mamba", {}, "state"),
        ("jamba", {}, "state"),
        ("qwen3_next", {}, "linear_attention"),
        ("recurrent_gemma", {}, "recurrent"),
        ("gemma3n_text", {}, "share the KV"),
        ("t5", {}, "encoder-decoder"),
        ("bert", {}, "both ways"),
        ("bloom", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("llama4_text", {}, "chunked_attention"),
        ("llava", {}, "multimodal"),
        ("stablelm", {}, "of its own"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
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
    rope = {
        "full_attention": {"rope_type": "longrope", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    plain = config("gemma3_text")
    plain.rope_parameters = rope
    assert "longrope" in str(refusal(plain))
