"""A fast part of the model matrix: one row of each kind of attention, position and checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.models.all_rows import ROWS
from benchmarks.models.row import Result, Row
from benchmarks.models.run_row import run
from benchmarks.models.support_table import (
    BEGIN,
    END,
    PAGE,
    is_current,
    key_of,
    line,
    on_tensorrt_llm,
    update,
    written,
)
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
    ("Qwen2-MoE", "safetensors"),
    ("Qwen2-MoE, windows", "safetensors"),
    ("PhiMoE", "safetensors"),
    ("Nemotron-4, Minitron", "safetensors"),
    ("Granite 4.0 micro", "safetensors"),
    ("OLMo 3", "safetensors"),
    ("Doge", "safetensors"),
    ("DiffLlama", "safetensors"),
    ("DeepSeek V2 Lite", "safetensors"),
    ("DeepSeek V3", "safetensors"),
    ("Llama 3.x", "GGUF Q4_K"),
    ("Gemma 2", "GGUF Q8_0"),
    ("Phi-3, longrope", "GGUF Q8_0"),
    ("Qwen3-MoE", "GGUF Q8_0"),
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


def test_a_line_gives_verdict_memory_release_and_reason() -> None:
    row = Row("A model", "llama")
    assert line(row, Result("exact", kv_bytes=2048)) == (
        "| A model | `LlamaForCausalLM` | safetensors | exact | 2.0 KiB | 1.0 |  |"
    )
    note = "the torch engine cannot run this model: /tmp/x/.engine.building has 1 tensors a|b"
    assert line(row, Result("refused", note)).endswith(
        "| 1.0 | the checkpoint has 1 tensors a\\|b |"
    )
    assert on_tensorrt_llm(Row("A model", "llama", form="GGUF F16")) == ""


def test_results_replace_the_lines_of_their_rows_only() -> None:
    first, second = ROWS[:2]
    page = f"before {BEGIN} {END} after"
    page = update(page, [(first, Result("exact")), (second, Result("exact"))])
    page = update(page, [(second, Result("refused", "too odd"))])
    lines = written(page)
    assert "| exact |" in lines[key_of(first)]
    assert "| refused |" in lines[key_of(second)]
    assert (page.startswith("before"), page.endswith("after")) == (True, True)


def test_each_row_has_a_name_and_a_line_on_the_page_as_it_should_end() -> None:
    keys = [key_of(row) for row in ROWS]
    assert len(set(keys)) == len(keys)
    lines = written(PAGE.read_text("utf-8"))
    assert set(lines) == set(keys), "run `python tests/benchmarks/model_matrix.py --new --write`"
    assert not [key_of(row) for row in ROWS if not is_current(row, lines)]
