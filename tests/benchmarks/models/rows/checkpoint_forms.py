"""Forms of an unquantized checkpoint, and files that it may lack."""

from __future__ import annotations

from benchmarks.models.row import Row

ROWS = [
    Row("Llama 3.x", "llama", form="bfloat16"),
    Row("Llama 3.x", "llama", form="sharded"),
    Row("Llama 3.x", "llama", form="pickle"),
    Row("Mistral", "mistral", "refused", form="tekken.json alone"),
]  # fmt: skip
