"""Mixtures of experts."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Mixtral", "mixtral"),
    Row("Qwen2-MoE", "qwen2_moe"),
    Row("Qwen2-MoE, windows", "qwen2_moe", values={
        "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}),
    Row("Qwen3-MoE", "qwen3_moe"),
    Row("gpt-oss", "gpt_oss"),
    Row("PhiMoE", "phimoe"),
    Row("GLM-4.5", "glm4_moe"),
    Row("OLMoE", "olmoe"),
    Row("Granite MoE", "granitemoe"),
    Row("Hunyuan A13B", "hunyuan_v1_moe", values={"head_dim": 128}),
    Row("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Row("dots.llm1", "dots1", values={
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6}),
    Row("MiniMax M2", "minimax_m2"),
]  # fmt: skip
