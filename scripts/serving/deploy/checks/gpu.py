"""Can torch use the GPUs that the workers will get: driver, indices, arithmetic, memory?

torch runs in a process of its own, so that no CUDA context stays behind in ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from serving.deploy.checks.findings import Finding
from serving.engine.files import human
from serving.gpus import driver_version

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


class TorchGpu(Struct, frozen=True):
    """One GPU as torch sees it; `works` means that a small product came out right."""

    name: str
    capability: str
    free_bytes: int
    total_bytes: int
    works: bool


class TorchFacts(Struct, frozen=True, kw_only=True):
    """`driver` is its version or empty; `cuda` is the CUDA release torch was built for.

    `gpus` are those observed, in the order of the indices; fewer when torch does not see all.
    """

    driver: str
    version: str = ""
    cuda: str | None = None
    gpus: list[TorchGpu] = []
    error: str = ""


def observe_torch(indices: Sequence[int]) -> TorchFacts:
    """Ask the driver and torch about these GPUs. Never raises: what went wrong is in `error`."""
    driver = driver_version()
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
        return TorchFacts(driver=driver, error=f"torch did not start CUDA within {PROBE_S:g} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return TorchFacts(driver=driver, error=f"torch on the GPU ended with: {last}")
    seen = {**json.loads(done.stdout.splitlines()[-1]), "driver": driver}
    return msgspec.convert(seen, TorchFacts)


def not_needed(device: str) -> list[Finding]:
    """The only finding for a deployment on CPU."""
    return [Finding("gpu", True, f"not needed: engine.device resolves to {device}")]


def judge_gpu(
    gpu_of_worker: Sequence[int], weights: int | None, facts: TorchFacts
) -> list[Finding]:
    """`gpu_of_worker` holds the GPU index of every worker; workers may share one. `facts` are about the
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
    for position, index in enumerate(sorted(set(gpu_of_worker))):
        if position < len(facts.gpus):
            num_workers = list(gpu_of_worker).count(index)
            findings.append(_judge_gpu(index, facts.gpus[position], num_workers, weights))
        else:
            missing = f"torch sees only {len(facts.gpus)} of the GPUs asked for"
            findings.append(Finding(f"gpu {index}", False, missing, "correct workers.gpus"))
    return findings


def _judge_gpu(index: int, gpu: TorchGpu, num_workers: int, weights: int | None) -> Finding:
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
