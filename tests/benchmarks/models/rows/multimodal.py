"""Multimodal checkpoints, of which the language model is served."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Gemma 3 (with images)", "gemma3", "refused"),
]  # fmt: skip
