"""This machine as far as an engine depends on it: its GPUs, their driver, installed packages.

Read while the Snakefile is parsed, so nothing heavy is imported: GPUs and the driver come from
/proc, package versions from their metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from msgspec import Struct

from serving.gpus import kernel_module_version

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
"""What shapes the engine of every backend."""


class Machine(Struct, frozen=True, kw_only=True):
    """`gpu_names` are distinct product names; empty when the driver does not say.

    `versions` has the installed version of each of `PACKAGES` and of `tensorrt_llm`, or `missing`.
    """

    has_gpu: bool
    gpu_names: list[str]
    driver: str
    versions: Mapping[str, str]


def this_machine(root: Path = Path("/")) -> Machine:
    gpus = root / "proc/driver/nvidia/gpus"
    return Machine(
        has_gpu=(gpus.is_dir() and any(gpus.iterdir())) or (root / "dev/nvidia0").exists(),
        gpu_names=_gpu_names(gpus),
        driver=kernel_module_version(root / "proc/driver/nvidia/version"),
        versions={package: _installed_version(package) for package in (*PACKAGES, "tensorrt_llm")},
    )


def _gpu_names(gpus: Path) -> list[str]:
    names = set()
    for information in gpus.glob("*/information"):
        if match := re.search(r"^Model:\s*(.+?)\s*$", information.read_text(), re.MULTILINE):
            names.add(match.group(1))
    return sorted(names)


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
