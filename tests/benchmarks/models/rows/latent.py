"""Multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from benchmarks.models.row import Row


def _yarn(factor: float, mscale: float, theta: float = 1e4) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


_LITE = {
    "q_lora_rank": None, "hidden_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 16, "num_hidden_layers": 27, "num_experts_per_tok": 6,
    "n_routed_experts": 64, "first_k_dense_replace": 1, "rope_parameters": _yarn(40.0, 0.707),
}  # fmt: skip
_V2 = {
    "hidden_size": 5120, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_hidden_layers": 60, "n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8,
    "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1, "rope_parameters": _yarn(40.0, 0.707),
}  # fmt: skip
V3 = {"max_position_embeddings": 163840, "rope_parameters": _yarn(40.0, 1.0)}
K2 = {
    "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "rope_parameters": _yarn(32.0, 1.0, theta=5e4),
}  # fmt: skip
_MINICPM3 = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + i / 16 for i in range(16)],
        "long_factor": [1.0 + i for i in range(16)],
        "original_max_position_embeddings": 32768,
        "factor": 1.0,
    }
}
_UNSTATED = {
    "rope_parameters": {k: v for k, v in _MINICPM3["rope_parameters"].items() if k != "factor"}
}

ROWS = [
    Row("DeepSeek V2 Lite", "deepseek_v2", values=_LITE),
    Row("DeepSeek V2", "deepseek_v2", values=_V2),
    Row("DeepSeek V3", "deepseek_v3", values=V3),
    Row("Kimi K2", "deepseek_v3", values=K2),
    Row("GLM-4.7-Flash", "glm4_moe_lite"),
    Row("MiniCPM3", "minicpm3", values=_MINICPM3),
    Row("MiniCPM3, longrope without a factor", "minicpm3", "refused", values=_UNSTATED),
    Row("Youtu-LLM", "youtu"),
    Row("LongCat-Flash", "longcat_flash"),
    Row("A.X K1", "axk1"),
    Row("DeepSeek V3.2", "deepseek_v32", "refused"),
    Row("GLM-5", "glm_moe_dsa", "refused"),
    Row("Kimi Linear", "kimi_linear", "refused"),
]  # fmt: skip
