"""The build's check runs on the device that will serve, and what happens when that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install -e '.[test]'")

from serving.engine.torch.build_check import serving_check
from serving.engine.torch.build_check.engine_answers import Case, answer
from serving.engine.torch.build_check.serving_check import (
    TOLERANCE,
    Difference,
    check_small_model,
    first_difference,
    reference,
)
from serving.errors import ModelError
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from unit.engine.interpreted_cuda import InterpretedRunner
from unit.engine.interpreted_cuda import no_gpu as no_gpu
from unit.engine.torch_rig import SIZES, random_prompts, save_model

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: see tests/gpu")
CONFIG = LlamaConfig(num_key_value_heads=8)


@without_gpu
def test_the_cuda_path_passes_the_check_and_a_wrong_window_does_not(
    tmp_path: Path, no_gpu: None
) -> None:
    """With Triton's interpreter: the kernels and the layer rewrite, not the graphs."""
    windows = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    model = save_model(tmp_path / "a", Qwen3Config(**SIZES, head_dim=16, **windows))
    [long] = random_prompts([19])
    cases = [Case("in chunks", long, 2)]
    hit = Case("a prefix hit", [*long[:17], 3], 1)
    answers = answer(
        model, "float32", "cpu", cases, [hit], runner_class=InterpretedRunner, chunk=12
    )
    assert answers[hit.name].cached_tokens == 16

    def difference(window: int) -> Difference | None:
        """From a model that sees `window` tokens."""
        loaded = AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="eager", sliding_window=window
        )
        expected = [reference(loaded, case) for case in (*cases, hit)]
        return first_difference(expected, answers, TOLERANCE["float32"])

    assert difference(8) is None
    assert difference(7) is not None


@without_gpu
def test_a_build_for_a_gpu_that_is_not_here_is_checked_on_the_cpu(tmp_path: Path) -> None:
    lines: list[str] = []
    check_small_model(CONFIG, tmp_path / "engine", lines.append, device="cuda")
    assert "no GPU is here" in lines[0]
    assert "the engine on cpu and `generate` agree" in lines[1]


class BrokenGpu:
    """Raises for the device `cuda`, and computes on the CPU as always."""

    def __init__(self, failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(folder: Path, dtype: str, device: str, *rest: Any, **others: Any) -> Any:
            if device == "cuda":
                raise failure
            return answer(folder, dtype, device, *rest, **others)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(serving_check, "answer", broken)


def test_a_gpu_without_memory_leaves_the_check_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BrokenGpu(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    lines: list[str] = []
    check_small_model(CONFIG, tmp_path / "engine", lines.append, device="cuda")
    assert "no memory left" in lines[0]
    assert "the engine on cpu" in lines[1]
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_fails_refuses_the_model_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BrokenGpu(RuntimeError("CUDA error: an illegal memory access"), monkeypatch)
    with pytest.raises(ModelError, match="illegal memory access") as failure:
        check_small_model(CONFIG, tmp_path / "engine", [].append, device="cuda")
    assert failure.value.remedy
    assert list(tmp_path.iterdir()) == []
