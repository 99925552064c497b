"""The container check: what it asks, what it concludes, and a remedy for each complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving.config import Config, parse
from serving.deploy.checks import container_probe
from serving.deploy.checks.container import (
    ProbeFacts,
    ProbeImport,
    check_container,
    judge_gpus,
    judge_imports,
    judge_limits,
    worker_modules,
)
from serving.deploy.checks.findings import Finding
from serving.deploy.containers import runtime as container_runtime
from unit.deploy.checks.fake_podman import FACTS, ID, podman
from unit.deploy.fake_programs import Script

GIB = 1024**3


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = tmp_path / "deployment"
    deployment.mkdir()
    monkeypatch.chdir(deployment)


def found(gpus: list[int] | None = None, **container: Any) -> dict[str, Finding]:
    raw = {"runtime": "podman", "image": "registry.example/x:1", **container}
    config = parse({"container": raw})
    return {each.name: each for each in check_container(config, gpus or [], print)}


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if not finding.ok}


def test_no_runtime_configured_needs_no_container() -> None:
    (finding,) = check_container(Config(), [], print)
    assert finding.ok


def test_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found()["runtime"].blocks


def test_image_that_starts_passes_and_is_removed_again(script: Script) -> None:
    calls = script("podman", podman())
    findings = found([0, 1])
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["image"].detail == "registry.example/x:1 abababababab"
    *_, tried, removed = calls.read_text().splitlines()
    assert "--device=nvidia.com/gpu=1" in tried
    assert tried.endswith("serving.worker.__main__ serving.engine.torch.engine ucxx")
    (probe,) = [word for word in tried.split() if word.endswith("container_probe.py")]
    assert Path(probe).is_file()
    assert removed.startswith("podman rm --force --time 0 --ignore serving-")


def test_image_must_be_named_or_built(script: Script) -> None:
    script("podman", podman())
    finding = found(image=None)["image"]
    assert "container.image is not set" in finding.detail
    assert "snakemake build_image" in finding.remedy


def test_absent_image_is_told_with_the_command_that_fetches_it(script: Script) -> None:
    calls = script("podman", podman(on_inspect="echo no such image >&2; exit 125"))
    finding = found()["image"]
    assert "podman says: no such image" in finding.detail
    assert "podman pull registry.example/x:1" in finding.remedy
    assert "podman pull" not in calls.read_text(), "a start must not hang in a download"


def test_absent_image_is_fetched_when_the_config_says_so(script: Script) -> None:
    inspect = f"test -e pulled && echo {ID} '[registry.example/x@sha256:{'cd' * 32}]' || exit 125"
    script("podman", podman(on_inspect=inspect, on_pull="echo Copying blob; touch pulled"))
    said: list[str] = []
    raw = {"runtime": "podman", "image": "registry.example/x:1", "pull": True}
    findings = check_container(parse({"container": raw}), [], said.append)
    assert all(finding.ok for finding in findings), findings
    assert "Copying blob" in said
    pins = json.loads(Path("results/images/pinned.json").read_text())
    assert pins == {"registry.example/x:1": f"sha256:{'cd' * 32}"}


def test_folder_that_is_to_be_mounted_must_exist(script: Script) -> None:
    script("podman", podman())
    assert "/nonesuch" in found(mounts={"/nonesuch": "/x"})["mounts"].detail


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("crun: setrlimit `RLIMIT_NOFILE`: Operation not permitted", "container.ulimits"),
        ("runc: error setting rlimit type 7: operation not permitted", "container.ulimits"),
        ("crun: cgroups in hybrid mode not supported", "runc"),
        ('exec: "python3": executable file not found in $PATH', "container.python"),
        ("stat /x/python: no such file: a command that was not found", "container.python"),
        ("Error: stat nvidia.com/gpu=0: no such file or directory", "nvidia-ctk cdi generate"),
        (
            "unsatisfied condition: cuda>=13.0, please update your driver",
            "update the NVIDIA driver",
        ),
        ("something new", "try it by hand"),
    ],
)
def test_a_run_that_fails_quotes_the_runtime_and_finds_its_remedy(
    script: Script, complaint: str, remedy: str
) -> None:
    script("podman", podman(on_run=f"echo '{complaint}' >&2; exit 126"))
    finding = found()["run"]
    assert complaint in finding.detail
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("unauthorized: authentication required", "podman login registry.example"),
        ("requested access to the resource is denied", "podman login registry.example"),
        ("dial tcp: lookup registry.example: no such host", "cannot reach registry.example"),
        ("manifest unknown: manifest unknown", "no such tag"),
        ("x509: certificate signed by unknown authority", "CA"),
        ("write /var/lib: no space left on device", "free disk space"),
        ("toomanyrequests: pull rate limit", "log in, or wait"),
    ],
)
def test_each_refusal_of_a_registry_has_its_own_remedy(
    script: Script, complaint: str, remedy: str
) -> None:
    failing = f"echo 'Error: {complaint}' >&2; exit 125"
    script("podman", podman(on_inspect="exit 125", on_pull=failing))
    finding = found(pull=True)["image"]
    assert complaint in finding.detail
    assert remedy in finding.remedy


def test_a_runtime_that_hangs_is_a_finding(script: Script) -> None:
    script("podman", "exec sleep 60")
    config = parse({"container": {"runtime": "podman", "image": "registry.example/x:1"}})
    (finding,) = check_container(config, [], print, answer_s=0.2)
    assert "no answer within 0.2 s" in finding.detail


def test_runtime_that_cannot_do_what_is_asked_is_a_finding(script: Script) -> None:
    script("apptainer", "echo 1.3.6")
    Path("x.sif").touch()
    finding = found(runtime="apptainer", image="x.sif", shm_bytes=GIB)["container.shm_bytes"]
    assert finding.blocks


# --- conclusions -------------------------------------------------------------------------------


def test_everything_in_order_is_fine() -> None:
    assert wrong([*judge_gpus(FACTS, 2), *judge_limits(FACTS)]) == {}
    assert judge_gpus(FACTS, 0) == []


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({"devices": 0}, "gpus inside", "no GPU is visible"),
        ({"cuda_gpus": 1}, "gpus inside", "CUDA sees 1"),
        (
            {"cuda_init": 803, "driver": "570.86.15"},
            "driver",
            "570.86.15 is too old for the image's CUDA 13.1.0, which needs 580",
        ),
        ({"cuda_init": 999}, "gpus inside", "error 999"),
        ({"cuda_init": None}, "gpus inside", "no libcuda.so.1"),
    ],
)
def test_gpus_that_cannot_be_used_block(change: dict[str, Any], name: str, said: str) -> None:
    finding = wrong(judge_gpus(msgspec.structs.replace(FACTS, **change), 2))[name]
    assert finding.blocks
    assert said in finding.detail
    assert finding.remedy


def test_driver_of_the_same_major_version_only_warns() -> None:
    older = msgspec.structs.replace(FACTS, driver="580.95.05", cuda_driver=13000)
    finding = wrong(judge_gpus(older, 2))["driver"]
    assert finding.warning
    assert "supports CUDA 13.0, and the image has 13.1.0" in finding.detail


def test_old_driver_with_working_compatibility_libraries_is_fine() -> None:
    """What CUDA itself says inside decides, not a comparison of versions."""
    assert wrong(judge_gpus(msgspec.structs.replace(FACTS, driver="535.54.03"), 2)) == {}


def test_small_shared_memory_and_pinned_memory_warn_where_they_matter() -> None:
    small = msgspec.structs.replace(FACTS, shm_bytes=64 * 2**20, memlock=8192)
    assert set(wrong(judge_limits(small))) == {"shared memory"}
    fabric = msgspec.structs.replace(small, infiniband=True)
    assert set(wrong(judge_limits(fabric))) == {"shared memory", "locked memory"}
    assert not any(finding.blocks for finding in judge_limits(fabric))


def test_import_that_fails_is_quoted_and_a_version_must_be_known() -> None:
    imports = [
        ProbeImport("serving.worker.__main__", error="ModuleNotFoundError: No module named 'nats'"),
        ProbeImport("tensorrt_llm", version="0.18.2"),
    ]
    findings = wrong(judge_imports(imports))
    assert "No module named 'nats'" in findings["serving.worker.__main__"].detail
    assert "0.18.2" in findings["tensorrt_llm"].detail
    assert wrong(judge_imports([ProbeImport("tensorrt_llm", version="1.2.0")])) == {}


def test_backend_decides_what_must_be_importable() -> None:
    tcp = parse({"kv_transfer": {"transport": "tcp"}})
    assert "ucxx" in worker_modules(Config())
    assert "ucxx" not in worker_modules(tcp)
    trtllm = parse({"engine": {"backend": "tensorrt_llm"}})
    assert worker_modules(trtllm)[-1] == "tensorrt_llm"


def test_probe_looks_at_this_machine_with_nothing_but_python() -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-I", container_probe.__file__, "json", "nonesuch"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = (line.removeprefix(container_probe.MARK) for line in done.stdout.splitlines())
    assert msgspec.json.decode(first, type=ProbeFacts).shm_bytes > 0
    fine, missing = (msgspec.json.decode(line, type=ProbeImport) for line in rest)
    assert (fine.module, fine.error) == ("json", "")
    assert "nonesuch" in missing.error


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("debian:12", "docker.io"),
        ("library/debian", "docker.io"),
        ("nvcr.io/nvidia/x:1", "nvcr.io"),
        ("docker://ghcr.io/a/b", "ghcr.io"),
        ("localhost:5000/a", "localhost:5000"),
        ("localhost/a:1", "localhost"),
    ],
)
def test_registry_of_a_reference(image: str, host: str) -> None:
    assert container_runtime.registry(image) == host
