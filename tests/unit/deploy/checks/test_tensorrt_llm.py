"""Whether the GPUs and their driver suit TensorRT-LLM, said before anything is loaded."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec
import pytest
from serving.config import parse
from serving.deploy.checks.findings import Finding
from serving.deploy.checks.tensorrt_llm import (
    MINIMUM_DRIVERS,
    judge_tensorrt_llm,
    library_line,
)
from unit.deploy.checks.h100 import H100

GIB = 1024**3
TWO = [H100, msgspec.structs.replace(H100, index=1)]


def wrong(
    worker_gpus: Any = ((0,), (1,)),
    gpus: Any = TWO,
    *,
    driver: str = "580.95.05",
    version: tuple[int, int] | None = (1, 2),
    dtype: str = "bfloat16",
    weights: int | None = 16 * GIB,
) -> dict[str, Finding]:
    found = judge_tensorrt_llm(
        worker_gpus, gpus, driver=driver, version=version, dtype=dtype, weights=weights
    )
    return {finding.name: finding for finding in found if not finding.ok}


def test_good_gpus_have_nothing_wrong() -> None:
    assert wrong() == {}
    assert wrong(weights=None) == {}


@pytest.mark.parametrize(
    ("driver", "version", "needed"),
    [("570.86.15", (1, 0), "575.57"), ("575.57", (1, 1), "580.95"), ("575.57", (1, 3), "580")],
)
def test_old_driver_says_which_is_needed(
    driver: str, version: tuple[int, int], needed: str
) -> None:
    finding = wrong(driver=driver, version=version)["driver"]
    assert finding.blocks
    assert f"needs {needed} or newer" in finding.detail
    assert needed in finding.remedy


def test_driver_is_compared_by_number_and_not_at_all_for_an_image() -> None:
    assert wrong(driver="1000.1", version=(1, 2)) == {}
    assert wrong(driver="470.1", version=None) == {}


def test_every_release_line_has_a_minimum() -> None:
    from serving.engine.trtllm.versions import SUPPORTED

    assert set(MINIMUM_DRIVERS) == set(SUPPORTED)


def test_no_driver_names_the_way_out() -> None:
    finding = wrong(driver="")["driver"]
    assert finding.blocks
    assert "engine.backend to torch" in finding.remedy


def test_bfloat16_needs_ampere_and_float16_does_not() -> None:
    old = [msgspec.structs.replace(gpu, capability=75) for gpu in TWO]
    assert wrong(gpus=old)["gpu 0"].blocks
    assert "float16" in wrong(gpus=old)["gpu 0"].remedy
    assert wrong(gpus=old, dtype="float16") == {}


def test_weights_are_shared_out_among_the_gpus_of_a_worker() -> None:
    assert wrong(weights=120 * GIB)["gpu 0"].blocks
    assert wrong(worker_gpus=[(0, 1)], weights=120 * GIB) == {}
    assert wrong(worker_gpus=[(0,), (0,)], weights=60 * GIB)["gpu 0"].blocks


def test_memory_that_others_hold_is_a_warning() -> None:
    busy = [msgspec.structs.replace(gpu, free_bytes=10 * GIB) for gpu in TWO]
    found = wrong(gpus=busy)["gpu 1"]
    assert found.warning
    assert not found.blocks


def test_gpu_that_the_driver_does_not_list_is_named() -> None:
    assert wrong(gpus=[H100])["gpu 1"].blocks


def test_library_line_is_that_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    raw: dict[str, Any] = {"engine": {"backend": "tensorrt_llm", "device": "cpu"}}
    assert library_line(parse(raw)) is None
    monkeypatch.setattr(metadata, "version", lambda name: "1.3.0rc27")
    assert library_line(parse(raw)) == (1, 3)
    assert library_line(parse(raw | {"container": {"runtime": "podman"}})) is None
