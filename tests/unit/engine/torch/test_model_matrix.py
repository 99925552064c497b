"""A fast part of the model matrix: one row of each kind of attention, position and checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.models.all_rows import ROWS
from benchmarks.models.row import Result, Row
from benchmarks.models.run_row import run
from benchmarks.models.support_table import table
from serving.engine.torch.kv.config_layout import kv_layout

FAST = {
    ("Llama 3.x", "sharded"),
    ("Llama 3.x", "tensors with scales"),
    ("Llama 3.x", "HQQ"),
    ("Llama 3.x", "AWQ"),
    ("Qwen2", "GPTQ, 8 bits in the order of activations"),
    ("Qwen3-MoE", "FP8 in blocks"),
    ("Mistral", "tekken.json alone"),
    ("gpt-oss", "MXFP4"),
    ("Qwen2-MoE, windows", "safetensors"),
    ("PhiMoE", "safetensors"),
    ("Nemotron-4, Minitron", "safetensors"),
    ("Granite 4.0 micro", "safetensors"),
    ("OLMo 3", "safetensors"),
    ("Doge", "safetensors"),
    ("DiffLlama", "safetensors"),
    ("DeepSeek V2 Lite", "safetensors"),
    ("DeepSeek V3", "safetensors"),
    ("MiniCPM3", "safetensors"),
    ("Ministral 3", "safetensors"),
    ("Qwen2-VL", "safetensors"),
    ("Qwen3-VL", "FP8 in blocks"),
    ("Qwen3-VL (MoE)", "safetensors"),
    ("GLM-4.5V", "safetensors"),
    ("Gemma 4 E2B (text)", "safetensors"),
}
ROWS_HERE = [row for row in ROWS if (row.name, row.form) in FAST]


@pytest.mark.parametrize("row", ROWS_HERE, ids=lambda row: f"{row.name}, {row.form}")
def test_a_model_is_exact_or_refused_as_the_table_says(row: Row, tmp_path: Path) -> None:
    result = run(row, tmp_path)
    assert result.verdict == row.expected, result.note


def test_kv_of_latents_is_what_the_architecture_promises() -> None:
    row = next(row for row in ROWS if row.name == "DeepSeek V3")
    layout = kv_layout(row.config, 16, "bfloat16")
    assert layout.token_bytes == 61 * (512 + 64) * 2


def test_the_fast_part_is_in_the_matrix() -> None:
    assert {(row.name, row.form) for row in ROWS_HERE} == FAST


def test_table_gives_verdict_memory_and_reason() -> None:
    row = Row("A model", "llama")
    text = table([(row, Result("exact", kv_bytes=2048)), (row, Result("refused", "too odd"))])
    assert "| A model | safetensors | exact | 2.0 KiB |  |" in text
    assert "| A model | safetensors | refused |  | too odd |" in text
