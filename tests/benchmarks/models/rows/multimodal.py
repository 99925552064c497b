"""Multimodal checkpoints, of which the language model is served."""

from __future__ import annotations

from typing import Any

from benchmarks.models.row import Row

# Encoders of images and sound: as small as their classes allow.
_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_SQUARE_VIT = {**_VIT, "image_size": [28, 28], "patch_size": [14, 14]}
_CLIP = {**_VIT, "model_type": "clip_vision_model"}
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model"}
_QWEN2_VIT: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "mlp_ratio": 1}
_QWEN25_VIT: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
_QWEN3_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip
_GLM_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "image_size": 28,
}  # fmt: skip
_LLAMA4_VIT: dict[str, Any] = {
    **_VIT, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "intermediate_size": 128,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 128,
}  # fmt: skip
_VOXTRAL_ENCODER: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128,
}  # fmt: skip


def _mrope(*section: int, theta: float = 1e6, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **more}


_QWEN2_TEXT: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": _mrope(16, 24, 24), "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN3_TEXT: dict[str, Any] = {
    "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rope_parameters": _mrope(24, 20, 20, theta=5e6, mrope_interleaved=True),
}  # fmt: skip
_GLM_ROPE = _mrope(8, 12, 12, theta=10000.0, partial_rotary_factor=0.5)
_GLM_MOE_TEXT: dict[str, Any] = {
    "model_type": "glm4v_moe_text", "rope_parameters": _GLM_ROPE, "head_dim": 128,
    "num_attention_heads": 96, "num_key_value_heads": 8, "attention_bias": True,
}  # fmt: skip
_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

ROWS = [
    Row("Gemma 3 (images)", "gemma3", values={
        "text_config": {"vocab_size": 262208, "sliding_window": 1024, "num_hidden_layers": 34},
        "vision_config": _VIT,
    }),
    Row("Gemma 4 (images)", "gemma4", values={
        "text_config": {"hidden_size_per_layer_input": 0}, "vision_config": {},
    }),
    Row("Gemma 4 E2B (images)", "gemma4", values={
        "text_config": {
            "num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_key_value_heads": 1,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        },
        "vision_config": {}, "audio_config": {},
    }),
    Row("Mistral Small 3.1", "mistral3", values={
        "text_config": {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "sliding_window": None,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}, "vocab_size": 131072},
        "vision_config": {**_VIT, "model_type": "pixtral"}, "tie_word_embeddings": False,
    }),
    Row("Ministral 3", "mistral3", values={
        "text_config": {"model_type": "ministral3"},
        "vision_config": {**_VIT, "model_type": "pixtral"}, "tie_word_embeddings": True,
    }),
    Row("Mistral Small 4", "mistral3", values={
        "text_config": {"model_type": "mistral4"}, "vision_config": {**_VIT, "model_type": "pixtral"},
    }),
    Row("Qwen2-VL", "qwen2_vl", values={"text_config": _QWEN2_TEXT, "vision_config": {**_QWEN2_VIT, "hidden_size": 64}}),
    Row("Qwen2.5-VL", "qwen2_5_vl", values={"text_config": _QWEN2_TEXT, "vision_config": _QWEN25_VIT}),
    Row("Qwen3-VL", "qwen3_vl", values={
        "text_config": _QWEN3_TEXT, "vision_config": _QWEN3_VIT, "tie_word_embeddings": True,
    }),
    Row("Qwen3-VL", "qwen3_vl", form="FP8 in blocks", values={
        "text_config": _QWEN3_TEXT, "vision_config": _QWEN3_VIT, "tie_word_embeddings": True,
    }),
    Row("Qwen3-VL (MoE)", "qwen3_vl_moe", values={
        "text_config": {**_QWEN3_TEXT, "num_experts": 128, "num_experts_per_tok": 8}, "vision_config": _QWEN3_VIT,
    }),
    Row("Llama 4 (images)", "llama4", values={"vision_config": _LLAMA4_VIT}),
    Row("Kimi K2.5", "kimi_k25", values={
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 32,
    }),
    Row("Kimi K2.5", "kimi_k25", form="int4 by compressed-tensors", values={
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 32,
    }),
    Row("GLM-4.1V", "glm4v", values={"text_config": {"rope_parameters": _GLM_ROPE}, "vision_config": _GLM_VIT}),
    Row("GLM-4.5V", "glm4v_moe", values={"text_config": _GLM_MOE_TEXT, "vision_config": _GLM_VIT}),
    Row("GLM-4.6V", "glm46v", values={
        "text_config": _GLM_MOE_TEXT, "vision_config": {**_GLM_VIT, "model_type": "glm4v_moe_vision"},
    }),
    Row("InternVL 3", "internvl", values={
        "text_config": {"model_type": "qwen2"}, "vision_config": _SQUARE_VIT, "tie_word_embeddings": False,
    }),
    Row("InternVL 3.5", "internvl", values={
        "text_config": {"model_type": "qwen3"}, "vision_config": _SQUARE_VIT, "tie_word_embeddings": True,
    }),
    Row("LLaVA 1.5", "llava", values={
        "text_config": {"model_type": "llama", "vocab_size": 32064}, "vision_config": _CLIP,
    }),
    Row("LLaVA-Next", "llava_next", values={
        "text_config": {"model_type": "mistral", "sliding_window": None, "vocab_size": 32064}, "vision_config": _CLIP,
    }),
    Row("LLaVA-OneVision", "llava_onevision", values={
        "text_config": {"model_type": "qwen2", "max_window_layers": 24}, "vision_config": _SIGLIP,
    }),
    Row("PaliGemma", "paligemma", "refused", {"vision_config": _SIGLIP, "text_config": {"model_type": "gemma"}}),
    Row("Idefics3", "idefics3", values={
        "text_config": {"model_type": "llama", "vocab_size": 128259, "rope_parameters": _LLAMA3_ROPE, "pad_token_id": 128002},
        "vision_config": _VIT,
    }),
    Row("SmolVLM", "smolvlm", values={
        "text_config": {"model_type": "llama", "vocab_size": 49280, "pad_token_id": 2}, "vision_config": _VIT, "pad_token_id": 2,
    }),
    Row("Voxtral", "voxtral", values={"audio_config": _VOXTRAL_ENCODER}),
    Row("Qwen2-Audio", "qwen2_audio", values={"audio_config": _ENCODER}),
    Row("Llama 3.2 Vision", "mllama", "refused"),
]  # fmt: skip
