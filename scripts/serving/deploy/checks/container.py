"""Can the configured container runtime start a worker in the configured image?

The runtime is asked for its version, for the image, and finally to run `container_probe` exactly
as it will run the workers: with their mounts, limits, devices and user. What any of them answers
is quoted, since the same command fails in several ways that need different remedies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import Config, ContainerConfig
from serving.deploy.checks import container_probe
from serving.deploy.checks.findings import Finding
from serving.deploy.containers import image_store
from serving.deploy.containers.removal import remove_container
from serving.deploy.containers.runtime import ASK_S, INSTALL, ask, complaint, run
from serving.deploy.containers.worker_command import contain
from serving.deploy.planning.source_digest import SCRIPTS
from serving.deploy.processes.supervisor_conf import RUN
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError, OperatorError
from serving.progress import Report

TRIAL_S = 300.0
"""A first import of TensorRT-LLM from a cold disk takes more than a minute."""
_USABLE = {
    "docker": ["info", "--format", "{{.ServerVersion}}"],
    "podman": ["info", "--format", "{{.Version.Version}}"],
    "apptainer": ["version"],
    "enroot": ["version"],
}
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA major version to the first driver branch that runs it (NVIDIA's page on minor-version
compatibility). A newer minor version than the driver's own runs, but compiles no PTX."""
LEAST_SHM_BYTES = 1 << 30
"""Docker's own default of 64 MiB ends in bus errors; MPI ranks and NCCL share more than that."""


class ProbeFacts(Struct, frozen=True):
    """What `container_probe.facts` says."""

    python: str
    cuda_version: str
    driver: str
    devices: int
    memlock: int
    shm_bytes: int
    infiniband: bool
    cuda_init: int | None
    cuda_driver: int | None
    cuda_gpus: int | None


class ProbeImport(Struct, frozen=True):
    """How one import went."""

    module: str
    version: str = ""
    error: str = ""


def check_container(config: Config, gpus: Sequence[int], report: Report) -> list[Finding]:
    """All findings about `container.*`; a single one when no container is configured.

    `gpus` are those that workers will use, none on CPU. Fetches a missing image when told to.
    """
    container = config.container
    if container.runtime == "none":
        return [Finding("container", True, "not needed: container.runtime is none")]
    program = shutil.which(container.runtime)
    if program is None:
        what, remedy = f"{container.runtime} is not on PATH", INSTALL[container.runtime]
        return [Finding("runtime", False, what, remedy)]
    findings = [ask("runtime", [container.runtime, *_USABLE[container.runtime]], ASK_S)]
    if findings[0].ok:
        findings += _missing_mounts(container)
        image = image_store.find_image(container)
        if not image.ok and container.image is not None and container.pull:
            image = image_store.pull_image(container, report)
        findings.append(image)
    if any(finding.blocks for finding in findings):
        return findings
    return [*findings, *_trial(config, gpus)]


def _missing_mounts(container: ContainerConfig) -> list[Finding]:
    return [
        Finding(
            "mounts",
            False,
            f"{source} does not exist, and should be {target} inside",
            "correct container.mounts: folders of this machine, each with its path inside",
        )
        for source, target in container.mounts.items()
        if not Path(source).expanduser().exists()
    ]


def _trial(config: Config, gpus: Sequence[int]) -> list[Finding]:
    """Run the probe as a worker would run."""
    container = config.container
    probe = container_probe.__file__
    try:
        contained = contain(
            container,
            [container.python, probe, *modules(config)],
            name="check",
            env={
                "PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPTS)),
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            },
            writable=[RUN],
        )
    except ConfigError as exc:
        return [Finding(exc.key, False, exc.what, exc.remedy)]
    try:
        remove_container(contained.removal)  # of a check that was killed
        code, text = run(contained.command, TRIAL_S, contained.env)
        remove_container(contained.removal)  # of a client that was given up on
    except OperatorError as exc:
        return [Finding("run", False, exc.what, exc.remedy)]
    told = [
        line.removeprefix(container_probe.MARK)
        for line in text.splitlines()
        if line.startswith(container_probe.MARK)
    ]
    if code != 0 or not told:
        what = text or "the image's Python said nothing"
        return [complaint("run", contained.command, code, what, container.image or "")]
    facts = msgspec.json.decode(told[0], type=ProbeFacts)
    imports = [msgspec.json.decode(line, type=ProbeImport) for line in told[1:]]
    return [
        Finding("run", True, f"Python {facts.python}"),
        *judge_gpus(facts, len(gpus)),
        *judge_limits(facts),
        *judge_imports(imports),
    ]


def modules(config: Config) -> list[str]:
    """What a worker imports, most particular last."""
    if config.engine.backend == "tensorrt_llm":
        return ["serving.worker.__main__", "tensorrt_llm"]
    if config.engine.backend == "mock":
        return ["serving.worker.__main__", "serving.engine.mock.engine"]
    ours = ["ucxx"] if config.kv_transfer.transport == "ucx" else []
    return ["serving.worker.__main__", "serving.engine.torch.engine", *ours]


def judge_gpus(facts: ProbeFacts, wanted: int) -> list[Finding]:
    """Do the workers' GPUs work inside, and is the driver new enough for the image's CUDA?"""
    if not wanted:
        return []
    if not facts.devices:
        return [
            Finding(
                "gpus inside",
                False,
                f"no GPU is visible in the container, and workers need {wanted}",
                "install nvidia-container-toolkit and configure it for this runtime "
                "(docker: `nvidia-ctk runtime configure`; podman: `nvidia-ctk cdi generate`)",
            )
        ]
    image, driver = _version(facts.cuda_version), _version(facts.driver)
    if facts.cuda_init != 0:
        return [_unusable(facts, image, driver)]
    findings = []
    if (facts.cuda_gpus or 0) < wanted:
        what = f"CUDA sees {facts.cuda_gpus} GPUs inside, and workers need {wanted}"
        remedy = (
            "check workers.gpus and container.extra_flags; MIG slices count as GPUs of their own"
        )
        findings.append(Finding("gpus inside", False, what, remedy))
    else:
        findings.append(Finding("gpus inside", True, f"{facts.cuda_gpus} usable"))
    own = divmod(facts.cuda_driver or 0, 1000)
    highest = (own[0], own[1] // 10)
    if image and highest < image[:2]:
        what = (
            f"the driver {facts.driver} knows CUDA {highest[0]}.{highest[1]}, and the image has "
            f"{facts.cuda_version}: it runs, but cannot compile kernels from PTX"
        )
        remedy = "update the driver when a kernel is reported as unsupported"
        findings.append(Finding("driver", False, what, remedy, warning=True))
    else:
        findings.append(Finding("driver", True, facts.driver or "unknown"))
    return findings


def _unusable(facts: ProbeFacts, image: tuple[int, ...], driver: tuple[int, ...]) -> Finding:
    least = LEAST_DRIVER.get(image[0]) if image else None
    if least is not None and driver and driver[0] < least:
        return Finding(
            "driver",
            False,
            f"the NVIDIA driver {facts.driver} is too old for the image's CUDA {facts.cuda_version}, "
            f"which needs {least} or newer",
            f"update the driver to {least} or newer, or choose an image of an older CUDA "
            "with container.base_tag or container.image",
        )
    why = (
        "there is no libcuda.so.1 in it" if facts.cuda_init is None else f"error {facts.cuda_init}"
    )
    return Finding(
        "gpus inside",
        False,
        f"CUDA does not start in the container ({why}; driver {facts.driver or 'unknown'}, "
        f"image's CUDA {facts.cuda_version or 'unknown'})",
        "check that nvidia-smi works outside, and that the runtime mounts the driver's libraries: "
        "NVIDIA_DRIVER_CAPABILITIES must hold `compute`",
    )


def judge_limits(facts: ProbeFacts) -> list[Finding]:
    """Shared memory for ranks of one worker, and pinned memory for InfiniBand."""
    findings = []
    if facts.shm_bytes < LEAST_SHM_BYTES:
        what = f"{facts.shm_bytes / 1e6:.0f} MB of shared memory inside; MPI and NCCL may need more"
        remedy = "leave container.shm_bytes unset to share the host's, or raise it"
        findings.append(Finding("shared memory", False, what, remedy, warning=True))
    else:
        findings.append(Finding("shared memory", True, f"{facts.shm_bytes / 1e9:.1f} GB"))
    if facts.memlock >= 0 and facts.infiniband:
        what = f"only {facts.memlock} bytes can be pinned inside; InfiniBand needs no limit"
        remedy = "set container.ulimits to {memlock: -1}, and let the runtime have that limit"
        findings.append(Finding("locked memory", False, what, remedy, warning=True))
    else:
        told = "unlimited" if facts.memlock < 0 else f"{facts.memlock} bytes; no InfiniBand"
        findings.append(Finding("locked memory", True, told))
    return findings


def judge_imports(imports: Sequence[ProbeImport]) -> list[Finding]:
    """Is in the image what workers import, in a version this project knows?"""
    findings = []
    for each in imports:
        name = each.module
        if each.error:
            remedy = "run `snakemake build_image`, or use an image that has it"
            findings.append(Finding(name, False, f"not usable inside: {each.error}", remedy))
        elif name == "tensorrt_llm":
            findings.append(_known_version(each.version))
        else:
            findings.append(Finding(name, True, each.version or "imported"))
    return findings


def _known_version(version: str) -> Finding:
    try:
        parse_version(version)
    except OperatorError as exc:
        return Finding("tensorrt_llm", False, exc.what, exc.remedy)
    return Finding("tensorrt_llm", True, version)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
