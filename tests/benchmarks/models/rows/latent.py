"""Multi-head latent attention (MLA)."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("DeepSeek V2", "deepseek_v2", "refused"),
    Row("DeepSeek V3", "deepseek_v3", "refused"),
]  # fmt: skip
