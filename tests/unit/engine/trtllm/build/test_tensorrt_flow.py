"""The flow trtllm-build: its command lines, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving.config import parse
from serving.engine.trtllm.build.checkpoint import read_checkpoint
from serving.engine.trtllm.build.quantization import Quantization
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.build.tensorrt_flow import build_engines
from serving.errors import ModelError, OperatorError
from unit.engine.trtllm.build.checkpoints import LLAMA, shard
from unit.engine.trtllm.build.library_fakes import Answer, FakeRun, flags

ENGINE = {
    "backend": "tensorrt_llm",
    "flow": "trtllm-build",
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_batch_size": 8,
    "max_num_batched_tokens": 256,
    "block_size": 64,
}


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.json").write_text("{}")
    shard(tmp_path / "model.safetensors", 100)
    return tmp_path


def build(
    staging: Path, *spreads: Parallelism, answer: Answer | None = None, **changed: Any
) -> FakeRun:
    run = FakeRun(answer=answer)
    checkpoint = msgspec.structs.replace(read_checkpoint(staging), **changed)
    config = parse({"engine": ENGINE, "tensorrt_llm": {"examples_dir": "/x"}})
    build_engines(staging, checkpoint, config, spreads, run=run, report=[].append)
    return run


def test_flags_come_from_the_config(staging: Path) -> None:
    convert, compile_ = build(staging, Parallelism(2, 2)).commands
    assert convert[:2] == ["{python}", "/x/models/core/llama/convert_checkpoint.py"]
    assert flags(convert) == {
        "--model_dir": str(staging),
        "--output_dir": str(staging / ".converted-tp2-pp2"),
        "--dtype": "bfloat16",
        "--tp_size": "2",
        "--pp_size": "2",
    }
    assert compile_[0] == "trtllm-build"
    assert flags(compile_) == {
        "--checkpoint_dir": str(staging / ".converted-tp2-pp2"),
        "--output_dir": str(staging / "trtllm-tp2-pp2"),
        "--max_batch_size": "8",
        "--max_input_len": "1024",
        "--max_seq_len": "1024",
        "--max_num_tokens": "256",
        "--max_beam_width": "1",
        "--gemm_plugin": "bfloat16",
        "--gpt_attention_plugin": "bfloat16",
        "--kv_cache_type": "paged",
        "--tokens_per_block": "64",
        "--context_fmha": "enable",
        "--use_paged_context_fmha": "enable",
        "--gather_generation_logits": "",
        "--workers": "4",
    }


def test_each_division_has_an_engine_with_its_tokenizer(staging: Path) -> None:
    build(staging, Parallelism(1, 1), Parallelism(2, 1))
    assert sorted(path.name for path in staging.glob("trtllm-*")) == [
        "trtllm-tp1-pp1",
        "trtllm-tp2-pp1",
    ]
    assert len(list((staging / "trtllm-tp2-pp1").glob("rank*.engine"))) == 2
    assert (staging / "trtllm-tp2-pp1/tokenizer.json").exists()
    assert not list(staging.glob(".converted*"))


def test_quantized_weights_are_refused(staging: Path) -> None:
    with pytest.raises(ModelError, match="FP8"):
        build(staging, Parallelism(), quantization=Quantization("FP8", "modelopt"))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("can't open file '/x/models/core/llama/convert_checkpoint.py'", "examples_dir"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "lower `engine.max_num_batched_tokens`"),
        ("RuntimeError: something", "logs/build_engine.log"),
    ],
)
def test_tool_that_fails_is_quoted_with_a_remedy(staging: Path, said: str, remedy: str) -> None:
    with pytest.raises(OperatorError) as caught:
        build(staging, Parallelism(), answer=lambda argv: (2, said))
    assert f"  | {said}" in caught.value.what
    assert "convert_checkpoint.py failed with exit status 2" in caught.value.what
    assert remedy in caught.value.remedy


def test_build_that_leaves_no_engine_is_an_error(staging: Path) -> None:
    def answer(argv: list[str]) -> tuple[int, str]:
        Path(flags(argv)["--output_dir"]).mkdir()
        return 0, "done"

    with pytest.raises(OperatorError, match="left 0 engines"):
        build(staging, Parallelism(), answer=answer)
