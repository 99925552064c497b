"""The GPUs of a machine as the driver describes them, and machines without any."""

from __future__ import annotations

import inspect
from pathlib import Path

import pynvml
import pytest
from serving.gpus import (
    Gpu,
    Nvml,
    driver_version,
    installed_gpus,
    kernel_module_version,
    nvlink_pairs,
)
from unit.fake_nvml import FakeNvml

GIB = 1024**3
H200 = Gpu("NVIDIA H200", 90, 140 * GIB, 139 * GIB, index=0, uuid="GPU-aaaa-1")
GB10 = Gpu("NVIDIA GB10", 121, index=1, uuid="GPU-bbbb-2")  # shares its memory with the CPU


def test_gpus_are_described_as_the_driver_describes_them() -> None:
    nvml = FakeNvml([H200, GB10])
    assert installed_gpus(nvml) == [H200, GB10]
    assert nvml.sessions == 0


def test_a_gpu_that_this_process_may_not_open_is_left_out_and_shifts_no_index() -> None:
    assert installed_gpus(FakeNvml([None, GB10])) == [GB10]


def test_a_gpu_without_answers_keeps_its_name() -> None:
    assert installed_gpus(FakeNvml([Gpu("NVIDIA odd")])) == [Gpu("NVIDIA odd")]


def test_a_driver_that_does_not_answer_is_not_the_same_as_no_gpu() -> None:
    assert installed_gpus(FakeNvml(broken=True)) is None
    assert installed_gpus(FakeNvml()) == []


def test_nvlink_pairs_are_those_that_the_driver_reports() -> None:
    four = [Gpu("NVIDIA A100", 80, index=index) for index in range(4)]
    pairs = {frozenset({0, 2}), frozenset({1, 3})}
    assert nvlink_pairs(FakeNvml(four, pairs)) == pairs
    assert nvlink_pairs(FakeNvml(four)) == frozenset()
    assert nvlink_pairs(FakeNvml([None, *four[1:]], pairs)) == {frozenset({1, 3})}
    assert nvlink_pairs(FakeNvml(four, pairs, broken=True)) == frozenset()


def test_compute_capability_is_written_as_nvidia_writes_it() -> None:
    assert [gpu.compute_capability for gpu in (H200, GB10)] == ["9.0", "12.1"]


def test_driver_version_comes_from_the_driver() -> None:
    assert driver_version(FakeNvml(driver="580.159.04")) == "580.159.04"


def test_every_function_in_use_exists_in_the_library_with_these_parameters() -> None:
    used = [name for name in vars(Nvml) if name.startswith("nvml")]
    assert len(used) == 10
    for name in used:
        expected = [p for p in inspect.signature(getattr(Nvml, name)).parameters if p != "self"]
        given = inspect.signature(getattr(pynvml, name)).parameters.values()
        assert [p.name for p in given if p.default is p.empty] == expected, name
    for name in ("NVML_P2P_CAPS_INDEX_NVLINK", "NVML_P2P_STATUS_OK"):
        assert isinstance(getattr(pynvml, name), int)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  "
            "(builder@)  \nGCC version:  gcc version 15.3.0 (GCC) \n",
            "580.159.04",
        ),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC "
            "2024\nGCC version:\n",
            "535.183.01",
        ),
        ("", ""),
        ("something else\n", ""),
    ],
)
def test_kernel_module_names_its_version(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert kernel_module_version(tmp_path / "version") == version


def test_no_kernel_module_is_no_driver(tmp_path: Path) -> None:
    assert kernel_module_version(tmp_path / "missing") == ""
