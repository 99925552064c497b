"""Can the workers use the GPUs they are given: driver, torch, indices, architecture, memory.

torch is asked in a process of its own, so that no CUDA context stays behind in ours. For
TensorRT-LLM, which may live in a container, only the driver is asked: `check_container` looks at
what the image makes of it. Nothing is looked at when the engine runs on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import msgspec
from msgspec import Struct

from serving.config import Config
from serving.deploy.checks.report import Finding
from serving.deploy.planning.gpus import InstalledGpu, driver_version
from serving.engine.files import human
from serving.engine.trtllm.quantization import BF16_NEEDS
from serving.engine.trtllm.versions import parse_version

MINIMUM_DRIVERS = {(1, 0): "575.57", (1, 1): "580.95", (1, 2): "580", (1, 3): "580"}
"""What TensorRT-LLM's release images and wheels need, by release line, as their notes say."""

PROBE_S = 120.0
"""torch's CUDA start takes seconds, on a cold disk tens of them."""

_PROBE = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        x = torch.ones(256, 256, device=f"cuda:{i}")
        works = (x @ x)[0, 0].item() == 256
        gpus.append(dict(name=p.name, capability=f"sm_{p.major}{p.minor}", free_bytes=free,
                         total_bytes=total, works=works))
print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda, gpus=gpus)))
"""


class Gpu(Struct, frozen=True):
    """One GPU as torch sees it; `works` means that a small product came out right."""

    name: str
    capability: str
    free_bytes: int
    total_bytes: int
    works: bool


class GpuFacts(Struct, frozen=True, kw_only=True):
    """`driver` is its version or empty; `cuda` is the CUDA release torch was built for.

    `gpus` are those asked about, in that order; the list is shorter when torch misses some.
    """

    driver: str
    version: str = ""
    cuda: str | None = None
    gpus: list[Gpu] = []
    error: str = ""


def observe(indices: Sequence[int]) -> GpuFacts:
    """Ask the driver and torch about these GPUs. Never raises: what went wrong is in `error`."""
    driver = _driver_version()
    visible = ",".join(map(str, indices))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
        )
    except subprocess.TimeoutExpired:
        return GpuFacts(driver=driver, error=f"torch did not start CUDA within {PROBE_S:g} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return GpuFacts(driver=driver, error=f"torch on the GPU ended with: {last}")
    seen = {**json.loads(done.stdout.splitlines()[-1]), "driver": driver}
    return msgspec.convert(seen, GpuFacts)


def _driver_version() -> str:
    """From `nvidia-smi`, else from the kernel module; empty when there is neither."""
    if smi := shutil.which("nvidia-smi"):
        done = subprocess.run(
            [smi, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return driver_version()


def not_needed(device: str) -> list[Finding]:
    return [Finding("gpu", True, f"not needed: engine.device resolves to {device}")]


def judge_gpu(placed: Sequence[int], weights: int | None, facts: GpuFacts) -> list[Finding]:
    """`placed` holds the GPU index of every worker; workers may share one. `facts` are about the
    distinct indices in ascending order. `weights` is one copy of the model in bytes, if known.
    """
    findings = [
        Finding(
            "driver",
            bool(facts.driver),
            facts.driver or "no NVIDIA driver answers",
            "install the NVIDIA driver, or set engine.device to cpu",
        )
    ]
    if not facts.gpus:
        why = facts.error or (
            f"torch {facts.version} sees no GPU"
            if facts.cuda
            else f"torch {facts.version} is built without CUDA"
        )
        remedy = (
            "compare the driver with torch's CUDA release, and CUDA_VISIBLE_DEVICES"
            if facts.cuda
            else "install a CUDA build of torch (`pip install torch --index-url "
            "https://download.pytorch.org/whl/cu130`), or set engine.device to cpu"
        )
        return [*findings, Finding("torch", False, why, remedy)]
    findings.append(Finding("torch", True, f"{facts.version}, CUDA {facts.cuda}"))
    for position, index in enumerate(sorted(set(placed))):
        if position < len(facts.gpus):
            num_workers = list(placed).count(index)
            findings.append(_one(index, facts.gpus[position], num_workers, weights))
        else:
            missing = f"torch sees only {len(facts.gpus)} of the GPUs asked for"
            findings.append(Finding(f"gpu {index}", False, missing, "correct workers.gpus"))
    return findings


def library_line(config: Config) -> tuple[int, int] | None:
    """Release line of the TensorRT-LLM on this host; None when workers use that of an image.

    Raises OperatorError when it is a version that is not supported.
    """
    if config.container.runtime != "none":
        return None
    try:
        return parse_version(metadata.version("tensorrt_llm")).line
    except metadata.PackageNotFoundError:
        return None  # the build says so, with what to do


def judge_tensorrt_llm(
    placed: Sequence[Sequence[int]],
    gpus: Sequence[InstalledGpu],
    *,
    driver: str,
    version: tuple[int, int] | None,
    dtype: str,
    weights: int | None,
) -> list[Finding]:
    """`placed` holds the GPU indices of each worker; `gpus` are those the driver answers for.

    `version` is the library's release line, None when it lives in a container or is not known.
    `weights` is one copy of the model in bytes, if known.
    """
    findings = [_driver(driver, version)]
    found = {gpu.index: gpu for gpu in gpus}
    for index in sorted({index for worker in placed for index in worker}):
        if index not in found:
            missing = "nvidia-smi does not list it"
            findings.append(Finding(f"gpu {index}", False, missing, "correct workers.gpus"))
            continue
        shares = [1 / len(worker) for worker in placed if index in worker]
        findings.append(_installed(found[index], dtype, int(sum(shares) * (weights or 0))))
    return findings


def _driver(driver: str, version: tuple[int, int] | None) -> Finding:
    if not driver:
        return Finding(
            "driver",
            False,
            "no NVIDIA driver answers, and TensorRT-LLM runs on NVIDIA GPUs alone",
            "install the NVIDIA driver, or set engine.backend to torch",
        )
    needed = MINIMUM_DRIVERS.get(version, "") if version else ""
    if _numbers(driver) >= _numbers(needed):
        return Finding("driver", True, driver + (f" ({needed} needed)" if needed else ""))
    assert version is not None, "nothing is needed for no version"
    line = ".".join(map(str, version))
    return Finding(
        "driver",
        False,
        f"{driver} is too old: TensorRT-LLM {line} was built for a CUDA that needs {needed} or newer",
        f"install driver {needed} or newer, or an older TensorRT-LLM; its images bring libraries "
        "for older drivers of data centre GPUs (container.runtime)",
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _installed(gpu: InstalledGpu, dtype: str, needed: int) -> Finding:
    """`needed`: bytes of weights of all workers that compute on it."""
    name = f"gpu {gpu.index}"
    major, minor = divmod(gpu.capability, 10)
    room = f"{human(gpu.free_bytes)} of {human(gpu.memory_bytes)} free"
    detail = f"{gpu.name} (sm_{major}{minor}), {room}"
    if dtype == "bfloat16" and 0 < gpu.capability < BF16_NEEDS:
        return Finding(
            name,
            False,
            f"{detail}: bfloat16 needs sm_80 or newer",
            "set engine.dtype to float16, or use a GPU of the Ampere generation or later",
        )
    if needed > gpu.memory_bytes > 0:
        return Finding(
            name,
            False,
            f"{detail}; its share of the weights alone needs {human(needed)}",
            "raise workers.tensor_parallel, or choose a smaller or a quantized model",
        )
    # The library takes its share of KV from what is free, so others' memory is missed twice.
    return Finding(
        name,
        gpu.memory_bytes == 0 or needed <= 0.9 * gpu.free_bytes,
        detail,
        "other processes hold its memory: `nvidia-smi` names them",
        warning=True,
    )


def _one(index: int, gpu: Gpu, num_workers: int, weights: int | None) -> Finding:
    name = f"gpu {index}"
    room = f"{human(gpu.free_bytes)} of {human(gpu.total_bytes)} free"
    detail = f"{gpu.name} ({gpu.capability}), {room}, {num_workers} workers"
    if not gpu.works:
        return Finding(
            name, False, f"{detail}: a matrix product is wrong", "check the GPU with nvidia-smi -q"
        )
    needed = num_workers * (weights or 0)
    if needed > gpu.total_bytes:
        return Finding(
            name,
            False,
            f"{detail}; the weights alone need {human(needed)}",
            "choose a smaller model or dtype, or give the workers more GPUs (workers.gpus)",
        )
    return Finding(
        name,
        needed <= gpu.free_bytes,
        detail,
        "other processes hold its memory: `nvidia-smi` names them",
        warning=True,
    )
