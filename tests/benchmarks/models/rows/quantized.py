"""Quantized checkpoints."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Llama 3.x", "llama", "refused", form="tensors with scales"),
    Row("Llama 3.x", "llama", "refused", form="FP8 by ModelOpt"),
    Row("Llama 3.x", "llama", "refused", form="GPTQ"),
    Row("gpt-oss", "gpt_oss", "refused", form="MXFP4"),
]  # fmt: skip
