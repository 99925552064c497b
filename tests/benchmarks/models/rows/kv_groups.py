"""Layers whose KV has several shapes, or that share the KV of others."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Gemma 3n (text)", "gemma3n_text", "refused"),
]  # fmt: skip
