"""Every row of the matrix. A new kind of rows is a module in `rows/`, named here."""

from __future__ import annotations

from benchmarks.models.rows import (
    checkpoint_forms,
    dense,
    experts,
    gguf,
    kv_groups,
    latent,
    multimodal,
    other_attention,
    quantized,
)

KINDS = {
    "Dense models: full attention and windows, every kind of rotary positions": dense.ROWS,
    "Mixtures of experts": experts.ROWS,
    "Multi-head latent attention (MLA)": latent.ROWS,
    "Layers whose KV has several shapes, or that share the KV of others": kv_groups.ROWS,
    "Multimodal checkpoints, of which the language model is served": multimodal.ROWS,
    "Attention, masks and positions that the engine does not compute, and layers that keep a state": other_attention.ROWS,
    "Forms of an unquantized checkpoint, and files that it may lack": checkpoint_forms.ROWS,
    "Quantized checkpoints": quantized.ROWS,
    "GGUF files": gguf.ROWS,
}
"""Rows by the heading that they have in the table."""

ROWS = [row for rows in KINDS.values() for row in rows]
