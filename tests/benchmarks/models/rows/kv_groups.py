"""Layers whose KV has several shapes, or that share the KV of others."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Gemma 3n (text)", "gemma3n_text"),
    Row("Gemma 4 (text)", "gemma4_text", values={"hidden_size_per_layer_input": 0}),
    Row("Gemma 4 E2B (text)", "gemma4_text", values={
        "num_hidden_layers": 35, "num_kv_shared_layers": 20, "num_key_value_heads": 1,
        "hidden_size": 1536, "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7}),
    Row("Gemma 4 31B (text)", "gemma4_text", values={
        "attention_k_eq_v": True, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
        "num_attention_heads": 32, "hidden_size_per_layer_input": 0}),
    Row("Gemma 4 26B-A4B (text)", "gemma4_text", values={
        "attention_k_eq_v": True, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "num_attention_heads": 16, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
        "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}),
]  # fmt: skip
