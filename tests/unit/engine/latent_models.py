"""Tiny models with latent attention (MLA), of every family that differs."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from unit.engine.torch_rig import SIZES

RANK, NOPE, ROPE, VALUE = 24, 16, 8, 12
LATENT: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
MOE: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, **MOE, "q_lora_rank": None, "rope_parameters": YARN},
    "deepseek_v3": {**LATENT, **MOE, "rope_parameters": YARN},
    "glm4_moe_lite": {**LATENT, **MOE, "rope_interleave": False},
    "minicpm3": LATENT,
}


def tiny(family: str) -> Any:
    return CONFIG_MAPPING[family](**FAMILIES[family])
