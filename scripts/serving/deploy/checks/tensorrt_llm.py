"""Do the GPUs and their driver suit TensorRT-LLM?

Only the driver is asked, since the library may live in a container: `checks/container` tries it
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from serving.config import Config
from serving.deploy.checks.findings import Finding
from serving.engine.files import human
from serving.engine.trtllm.build.quantization import BF16_NEEDS
from serving.engine.trtllm.versions import parse_version
from serving.gpus import Gpu

MINIMUM_DRIVERS = {(1, 0): "575.57", (1, 1): "580.95", (1, 2): "580", (1, 3): "580"}
"""The driver that each release line needs, from the notes of its images and wheels."""


def library_line(config: Config) -> tuple[int, int] | None:
    """Release line of the TensorRT-LLM on this host; None when workers use an image's.

    Raises OperatorError for a version that is not supported.
    """
    if config.container.runtime != "none":
        return None
    try:
        return parse_version(metadata.version("tensorrt_llm")).line
    except metadata.PackageNotFoundError:
        return None  # the build reports it, with a remedy


def judge_tensorrt_llm(
    worker_gpus: Sequence[Sequence[int]],
    gpus: Sequence[Gpu],
    *,
    driver: str,
    version: tuple[int, int] | None,
    dtype: str,
    weights: int | None,
) -> list[Finding]:
    """`worker_gpus` holds the GPU indices of each worker; `gpus` are those the driver lists.

    `version` is the library's release line, None when it lives in a container or is not known.
    `weights` is one copy of the model in bytes, if known.
    """
    findings = [_judge_driver(driver, version)]
    found = {gpu.index: gpu for gpu in gpus}
    for index in sorted({index for worker in worker_gpus for index in worker}):
        if index not in found:
            missing = "the NVIDIA driver does not list it"
            findings.append(Finding(f"gpu {index}", False, missing, "correct workers.gpus"))
            continue
        shares = [1 / len(worker) for worker in worker_gpus if index in worker]
        findings.append(_judge_gpu(found[index], dtype, int(sum(shares) * (weights or 0))))
    return findings


def _judge_driver(driver: str, version: tuple[int, int] | None) -> Finding:
    if not driver:
        return Finding(
            "driver",
            False,
            "no NVIDIA driver answers, and TensorRT-LLM needs NVIDIA GPUs",
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


def _judge_gpu(gpu: Gpu, dtype: str, needed: int) -> Finding:
    """`needed`: bytes of weights of all workers that compute on it."""
    name = f"gpu {gpu.index}"
    room = f"{human(gpu.free_bytes)} of {human(gpu.memory_bytes)} free"
    detail = f"{gpu.name} (sm_{gpu.capability}), {room}"
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
    # The library takes its share of KV from the free memory, so memory that others hold costs twice.
    return Finding(
        name,
        gpu.memory_bytes == 0 or needed <= 0.9 * gpu.free_bytes,
        detail,
        "other processes hold its memory: `nvidia-smi` names them",
        warning=True,
    )
