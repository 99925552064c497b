"""What the driver says of the GPUs, in the words it was seen to use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serving.deploy.planning.gpus import (
    MIB,
    InstalledGpu,
    describe_host,
    driver_version,
    installed_gpus,
    parse_gpus,
)

LINE = "0, NVIDIA H200, 143771, 143156, 9.0, 580.159.04"
H200 = InstalledGpu(
    index=0,
    name="NVIDIA H200",
    memory_bytes=143771 * MIB,
    free_bytes=143156 * MIB,
    capability=90,
    driver="580.159.04",
)


def test_a_line_is_a_gpu_with_sizes_in_bytes() -> None:
    assert parse_gpus(f"{LINE}\n1, NVIDIA GB10, [N/A], [N/A], 12.1, 580.95.05\n") == [
        H200,
        InstalledGpu(
            index=1,
            name="NVIDIA GB10",
            memory_bytes=0,
            free_bytes=0,
            capability=121,
            driver="580.95.05",
        ),
    ]


def test_other_lines_are_no_gpus() -> None:
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't talk to the driver\n") == []
    assert parse_gpus("") == []


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
def test_driver_version_comes_from_the_kernel_module(
    text: str, version: str, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_no_kernel_module_is_no_driver(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "missing") == ""


def test_a_host_has_the_named_gpus_or_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed_gpus() == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{LINE}'\necho '1, Old, 1, 1, 7.0, 1.0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert describe_host([0]).capabilities == [90]
    host = describe_host([])
    assert host.capabilities == [70, 90]
    assert host.memory_bytes == MIB
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert installed_gpus() == []
