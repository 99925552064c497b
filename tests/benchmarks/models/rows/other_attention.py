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
    Row("Falcon, ALiBi", "falcon", "refused", {"alibi": True}),
    Row("Mamba", "mamba", "refused"),
]  # fmt: skip
