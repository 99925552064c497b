"""Mixtures of experts."""

from __future__ import annotations

from benchmarks.models.positions import YARN
from benchmarks.models.row import Row

GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0156, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}  # fmt: skip

ROWS = [
    Row("Mixtral", "mixtral"),
    Row("Mixtral, windows", "mixtral", values={"sliding_window": 4096}),
    Row("Qwen2-MoE", "qwen2_moe"),
    Row("Qwen2-MoE, windows", "qwen2_moe", values={
        "use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 4}),
    Row("Qwen3-MoE", "qwen3_moe"),
    Row("Qwen3-MoE, YaRN", "qwen3_moe", values={
        "norm_topk_prob": True, "mlp_only_layers": [0], "rope_parameters": YARN}),
    Row("gpt-oss", "gpt_oss"),
    Row("PhiMoE", "phimoe"),
    Row("GLM-4.5", "glm4_moe"),
    Row("GLM-4.5, norms and biases", "glm4_moe", values={
        "use_qk_norm": True, "attention_bias": True}),
    Row("OLMoE", "olmoe"),
    Row("Granite MoE", "granitemoe"),
    Row("Granite 3 MoE", "granitemoe", values=GRANITE),
    Row("Granite MoE, shared", "granitemoeshared", values={
        **GRANITE, "shared_intermediate_size": 1024}),
    Row("Granite MoE, windows", "granitemoe_swa"),
    Row("Hunyuan A13B", "hunyuan_v1_moe", values={"head_dim": 128}),
    Row("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Row("dots.llm1", "dots1", values={
        "n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6}),
    Row("MiniMax M2", "minimax_m2"),
    Row("MiniMax M3 (text)", "minimax_m3_vl_text"),
    Row("Trinity (AFMoE)", "afmoe"),
    Row("Aria (text)", "aria_text"),
    Row("Cohere 2 MoE", "cohere2_moe"),
    Row("DBRX", "dbrx", "refused"),
    Row("K-EXAONE", "exaone_moe"),
    Row("FlexOlmo", "flex_olmo"),
    Row("Hunyuan 3", "hy_v3"),
    Row("JetMoE", "jetmoe"),
    Row("Laguna", "laguna"),
    Row("Mellum 2", "mellum"),
    Row("Solar Open", "solar_open"),
    Row("MiMo V2 Flash", "mimo_v2_flash", "refused"),
]  # fmt: skip
