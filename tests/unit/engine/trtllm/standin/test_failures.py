"""Failures of the stand-in on demand, and its build tools."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standin.install import install
from unit.engine.trtllm.standin import standin_rig as rig


@pytest.mark.parametrize(("kind", "cause"), [("oom", "out of memory"), ("no_gpu", "No CUDA GPUs")])
def test_standin_fails_to_start_on_demand(
    library: Any, monkeypatch: pytest.MonkeyPatch, kind: str, cause: str
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", kind)
    with pytest.raises(RuntimeError, match="Executor worker returned error") as caught:
        library.llm()
    assert cause in str(caught.value.__cause__)


async def test_standin_hangs_on_demand(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", f"hang@{tmp_path / 'hang'}")
    llm = library.llm()
    await llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(2))
    (tmp_path / "hang").touch()
    result = llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await result


def test_more_gpus_than_there_are(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RuntimeError, match="Only 1 GPUs are available, but 2 are required"):
        library.llm(tensor_parallel_size=2)


def tool(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, env=rig.environment(root), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def engine(tmp_path: Path, model: Path) -> Iterator[tuple[Path, Path]]:
    """Installed as 1.2.1, and an engine built there for 2 x 1 GPUs."""
    with rig.installed(tmp_path, "1.2.1") as root:
        script = root / "examples" / "models" / "core" / "llama" / "convert_checkpoint.py"
        checkpoint, built = str(tmp_path / "checkpoint"), tmp_path / "built"
        paths = ("--model_dir", str(model), "--output_dir", checkpoint)
        sizes = ("--dtype", "float32", "--tp_size", "2", "--pp_size", "1")
        done = tool(root, sys.executable, str(script), *paths, *sizes)
        assert done.returncode == 0, done.stderr
        limits = ("--max_batch_size", "4", "--max_seq_len", "128", "--max_num_tokens", "64")
        plugins = ("--tokens_per_block", "16", "--use_paged_context_fmha", "enable")
        paths = ("--checkpoint_dir", checkpoint, "--output_dir", str(built))
        done = tool(root, "trtllm-build", *paths, *limits, *plugins)
        assert done.returncode == 0, done.stderr
        yield root, built


async def test_a_built_engine_loads_and_generates(
    engine: tuple[Path, Path], expected: list[int]
) -> None:
    _, built = engine
    config = json.loads((built / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert config["pretrained_config"]["mapping"]["tp_size"] == 2
    assert sorted(path.name for path in built.glob("rank*")) == ["rank0.engine", "rank1.engine"]
    flow: Any = importlib.import_module("tensorrt_llm._tensorrt_engine")
    top: Any = importlib.import_module("tensorrt_llm")
    with pytest.raises(ValueError, match="tp_size 4 is not consistent with the engine's tp_size 2"):
        flow.LLM(model=str(built), tensor_parallel_size=4)
    with pytest.raises(ValueError, match="max_batch_size"):
        flow.LLM(model=str(built), max_batch_size=8)
    llm = flow.LLM(model=str(built), skip_tokenizer_init=True, enable_chunked_prefill=True)
    params = top.SamplingParams(end_id=-1, max_tokens=6)
    result = await llm.generate_async(inputs=rig.PROMPT, sampling_params=params)
    assert result.outputs[0].token_ids == expected[:6]
    with pytest.raises(ValueError, match="gather_generation_logits"):
        llm.generate_async(
            inputs=rig.PROMPT, sampling_params=top.SamplingParams(end_id=-1, logprobs=1)
        )
    llm.shutdown()
    (built / "rank1.engine").unlink()
    with pytest.raises(FileNotFoundError):
        flow.LLM(model=str(built))


def test_build_tools_refuse_flags_they_do_not_have(engine: tuple[Path, Path]) -> None:
    root, _ = engine
    for argv in (["trtllm-build", "--max_output_len", "5"], ["trtllm-build", "--gemm_plugin", "x"]):
        done = tool(root, *argv)
        assert done.returncode == 2
        assert "usage: trtllm-build" in done.stderr


def test_the_newest_version_brings_no_build_tools(tmp_path: Path) -> None:
    assert not (install(tmp_path / "there", rig.NEWEST) / "bin").exists()
