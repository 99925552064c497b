"""Can the configured container runtime start a worker in the configured image?

The check asks the runtime for its version and for the image. Then it runs `container_probe` exactly
as workers will run: with their mounts, limits, devices and user. Error messages of the runtime are
quoted, since the same command fails in several ways that need different remedies.
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
from serving.deploy.processes.launchers import RUN
from serving.engine.trtllm.versions import parse_version
from serving.errors import ConfigError, OperatorError
from serving.progress import Report

TRIAL_S = 300.0
"""A first import of TensorRT-LLM from a cold disk takes more than a minute."""
_VERSION_QUERY = {
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
    """The answer of `container_probe.facts`."""

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


def check_container(
    config: Config, gpus: Sequence[int], report: Report, *, answer_s: float = ASK_S
) -> list[Finding]:
    """All findings about `container.*`; a single one when no container is configured.

    `gpus` are those that workers will use, none on CPU. With `container.pull` a missing image is
    fetched. The runtime has `answer_s` to answer at all.
    """
    container = config.container
    if container.runtime == "none":
        return [Finding("container", True, "not needed: container.runtime is none")]
    program = shutil.which(container.runtime)
    if program is None:
        what, remedy = f"{container.runtime} is not on PATH", INSTALL[container.runtime]
        return [Finding("runtime", False, what, remedy)]
    findings = [ask("runtime", [container.runtime, *_VERSION_QUERY[container.runtime]], answer_s)]
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
            f"{source} does not exist, but is to be mounted at {target}",
            "correct container.mounts: it maps folders of this machine to paths inside",
        )
        for source, target in container.mounts.items()
        if not Path(source).expanduser().exists()
    ]


def _trial(config: Config, gpus: Sequence[int]) -> list[Finding]:
    """Run the probe as a worker would run. The container is removed again, even after a failure."""
    container = config.container
    probe = container_probe.__file__
    try:
        contained = contain(
            container,
            [container.python, probe, *worker_modules(config)],
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
        remove_container(contained.removal)  # left by a check that was killed
        try:
            code, text = run(contained.command, TRIAL_S, contained.env)
        finally:
            remove_container(contained.removal)  # left by a client that did not return in time
    except OperatorError as exc:
        return [Finding("run", False, exc.what, exc.remedy)]
    answers = [
        line.removeprefix(container_probe.MARK)
        for line in text.splitlines()
        if line.startswith(container_probe.MARK)
    ]
    if code != 0 or not answers:
        what = text or "the image's Python printed nothing"
        return [complaint("run", contained.command, code, what, container.image or "")]
    facts = msgspec.json.decode(answers[0], type=ProbeFacts)
    imports = [msgspec.json.decode(line, type=ProbeImport) for line in answers[1:]]
    return [
        Finding("run", True, f"Python {facts.python}"),
        *judge_gpus(facts, len(gpus)),
        *judge_limits(facts),
        *judge_imports(imports),
    ]


def worker_modules(config: Config) -> list[str]:
    """The modules that a worker imports, the most specific last."""
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
    major, minor = divmod(facts.cuda_driver or 0, 1000)
    highest = (major, minor // 10)
    if image and highest < image[:2]:
        what = (
            f"the driver {facts.driver} supports CUDA {highest[0]}.{highest[1]}, and the image has "
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
        limit = "unlimited" if facts.memlock < 0 else f"{facts.memlock} bytes; no InfiniBand"
        findings.append(Finding("locked memory", True, limit))
    return findings


def judge_imports(imports: Sequence[ProbeImport]) -> list[Finding]:
    """Does the image have the modules that workers import, in versions that this project knows?"""
    findings = []
    for probed in imports:
        name = probed.module
        if probed.error:
            remedy = "run `snakemake build_image`, or use an image that has it"
            findings.append(Finding(name, False, f"not usable inside: {probed.error}", remedy))
        elif name == "tensorrt_llm":
            findings.append(_known_version(probed.version))
        else:
            findings.append(Finding(name, True, probed.version or "imported"))
    return findings


def _known_version(version: str) -> Finding:
    try:
        parse_version(version)
    except OperatorError as exc:
        return Finding("tensorrt_llm", False, exc.what, exc.remedy)
    return Finding("tensorrt_llm", True, version)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
