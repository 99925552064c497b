"""Which models the torch engine runs exactly, decided from config.json alone.

The engine needs attention that goes through transformers' attention interface, and positions that do
not depend on the length of the prompt. A model that breaks one of these is refused with the reason,
before any weight is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from serving.kv_layout import KvLayout

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
# Fixed up to `context.model_max_len`: `dynamic` begins beyond max_position_embeddings.
_FIXED_AT_FIRST = {"dynamic", "longrope"}
_MULTIMODAL_REMEDY = (
    "set `model.text_only: auto` to serve its language model, or choose a text model"
)
_REMEDY = "choose another model; README.md lists under Limits what is not supported"


def require_supported(config: PreTrainedConfig) -> None:
    """Raises ModelError with the first reason why this engine cannot run `config` exactly."""
    if reason := refusal(config):
        remedy = _REMEDY
        if reason.startswith("it is multimodal"):
            remedy = _MULTIMODAL_REMEDY
        raise ModelError(f"the torch engine cannot run this model: {reason}", remedy=remedy)


def require_equal_layers(layout: KvLayout, num_layers: int) -> None:
    """For CUDA, whose kernels know one shape of KV. Raises ModelError."""
    if not layout.is_uniform or layout.num_layers != num_layers:
        raise ModelError(
            "the torch engine cannot run this model on CUDA: some of its layers keep KV of other "
            "shapes than others, or share the KV of others",
            remedy="set `engine.device: cpu`, or choose another model",
        )


def refusal(config: PreTrainedConfig) -> str | None:
    """The reason to refuse the model, or None."""
    plain = config.to_dict()
    return (
        _wrong_kind(config, plain)
        or _wrong_attention(plain)
        or _wrong_positions(plain)
        or _wrong_class(config, plain)
    )


def _wrong_kind(config: PreTrainedConfig, plain: dict[str, Any]) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    parts = [key for key in ("vision_config", "audio_config", "text_config") if plain.get(key)]
    if parts:
        return f"it is multimodal ({parts[0]})"
    if plain.get("thinker_config"):
        return "it is multimodal (thinker_config)"
    return None


def _wrong_attention(plain: dict[str, Any]) -> str | None:
    kinds = plain.get("layer_types") or plain.get("layers_block_type") or plain.get("block_types")
    if other := set(kinds or []) - _LAYER_TYPES:
        return f"some layers are {', '.join(sorted(other))}, not softmax attention over KV"
    if plain.get("index_topk"):
        return "an indexer picks the tokens that its layers attend to"
    # A hybrid family may have members whose layers all attend (Granite 4.0 micro).
    all_attend = bool(kinds)
    stateful = [key for key in plain if key.startswith(("mamba_", "ssm_", "conv_L_cache"))]
    if not all_attend and (stateful or plain.get("state_size")):
        return f"some layers keep a state instead of KV ({(stateful or ['state_size'])[0]})"
    if plain.get("cla_share_factor"):
        return "some layers share the KV of others (cla_share_factor), which transformers ignores"
    if plain.get("is_decoder") is False and "type_vocab_size" in plain:
        return "its attention looks both ways"
    sizes = {plain.get("head_dim"), plain.get("v_head_dim")} - {None}
    if len(sizes) > 1 and not plain.get("kv_lora_rank"):
        return "its keys and values have different sizes"
    if isinstance(plain.get("num_key_value_heads"), list):
        return "its layers have different numbers of KV heads"
    return None


def _wrong_positions(plain: dict[str, Any]) -> str | None:
    attention = plain.get("attn_config")
    attention = attention if isinstance(attention, dict) else {}
    if plain.get("alibi") or attention.get("alibi") or plain.get("model_type") in {"bloom", "mpt"}:
        return "its positions are ALiBi biases"
    for parameters in _rotary(plain):
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in _FIXED_ROPE | _FIXED_AT_FIRST:
            return f"its rotary positions are of a kind not tested here ({kind})"
        if plain.get("kv_lora_rank") and kind != "default" and "factor" not in parameters:
            # transformers' latent attention reads it for every kind, and fails without. This is
            # what it computes elsewhere when no factor is stated.
            length = plain.get("max_position_embeddings") or 1
            factor = length / (parameters.get("original_max_position_embeddings") or length)
            return (
                f"its rotary positions ({kind}) state no `factor`, without which transformers "
                f'cannot make the model; add `"factor": {factor}` to them in config.json'
            )
    return None


def _rotary(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of rotary positions: one set, or one for each type of layer."""
    rope = plain.get("rope_parameters") or plain.get("rope_scaling") or {}
    return [value for value in rope.values() if isinstance(value, dict)] or [rope]


def model_class_of(config: PreTrainedConfig) -> Any:
    """transformers' causal language model for `config`, or None."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping.get(type(config), None)


def _wrong_class(config: PreTrainedConfig, plain: dict[str, Any]) -> str | None:
    model_class = model_class_of(config)
    if model_class is None:
        return f"{plain.get('model_type')} is no causal language model"
    stated = plain.get("architectures") or [model_class.__name__]
    if stated[0] != model_class.__name__:
        return f"it is a {stated[0]}, not a {model_class.__name__}"
    if not model_class._supports_attention_backend:
        return f"{model_class.__name__} computes attention in a way of its own"
    return None
