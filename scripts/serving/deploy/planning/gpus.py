"""What `nvidia-smi` says of the GPUs: names, memory, compute capability, driver. Loads no CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from msgspec import Struct

from serving.engine.trtllm.target import Gpu, Host

ASK_S = 30.0
MIB = 1024 * 1024
_FIELDS = "index,name,memory.total,memory.free,compute_cap,driver_version"
_MODULE = Path("/proc/driver/nvidia/version")


class InstalledGpu(Struct, frozen=True, kw_only=True):
    """One line of its answer; sizes in bytes, 0 where it said none (`[N/A]`)."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    capability: int
    driver: str


def installed_gpus() -> list[InstalledGpu]:
    """Empty without `nvidia-smi`, or when it refuses."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    command = [smi, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[InstalledGpu]:
    """Lines that are no answer are passed over. Sizes come in MiB, capability as `9.0`."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != _FIELDS.count(",") + 1 or not values[0].isdigit():
            continue
        found.append(
            InstalledGpu(
                index=int(values[0]),
                name=values[1],
                memory_bytes=_whole(values[2]) * MIB,
                free_bytes=_whole(values[3]) * MIB,
                capability=_whole(values[4].replace(".", "")),
                driver=values[5],
            )
        )
    return found


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


def driver_version(module: Path = _MODULE) -> str:
    """Of the loaded kernel module, without starting anything; empty when there is none."""
    try:
        first = module.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", f" {first} ")
    return match.group(1) if match else ""


def describe_host(indices: list[int]) -> Host:
    """The GPUs of these indices, all of them where none are named, and the driver."""
    gpus = [gpu for gpu in installed_gpus() if not indices or gpu.index in indices]
    return Host(
        gpus=[Gpu(gpu.name, gpu.capability, gpu.memory_bytes) for gpu in gpus],
        driver=driver_version() or next((gpu.driver for gpu in gpus), ""),
    )
