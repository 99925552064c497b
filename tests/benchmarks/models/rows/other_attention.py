"""Attention, masks and positions that the engine does not compute, and layers that keep a state."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Gemma 3, bidirectional", "gemma3_text", "refused", {"use_bidirectional_attention": True}),
    Row("Granite 4.0, Mamba", "granitemoehybrid", "refused"),
    Row("Qwen3-Next", "qwen3_next", "refused"),
    Row("Llama 4 (text)", "llama4_text"),
    Row("DiffLlama", "diffllama", "refused"),
    Row("Doge", "doge", "refused"),
    Row("HRM", "hrm_text", "refused"),
    Row("Falcon", "falcon", "refused"),
    Row("StableLM", "stablelm", "refused"),
    Row("LFM2", "lfm2", "refused", {
        "layer_types": ["conv", "full_attention"] * 8, "num_hidden_layers": 16}),
    Row("LFM2-MoE", "lfm2_moe", "refused"),
    Row("Qwen3.5 (text)", "qwen3_5_text", "refused"),
    Row("Nemotron-H", "nemotron_h", "refused"),
    Row("Falcon-H1", "falcon_h1", "refused"),
    Row("Jamba", "jamba", "refused"),
    Row("BLOOM", "bloom", "refused"),
    Row("MPT", "mpt", "refused"),
    Row("GPT-J", "gptj", "refused"),
    Row("RWKV", "rwkv", "refused"),
    Row("Falcon, ALiBi", "falcon", "refused", {"alibi": True}),
    Row("Mamba", "mamba", "refused"),
]  # fmt: skip
