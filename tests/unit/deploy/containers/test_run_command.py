"""Command lines of each runtime, exactly; what changes them, and what a runtime cannot do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from serving.config import ContainerConfig, parse
from serving.deploy.containers.run_command import (
    ContainedProgram,
    Mount,
    client_command,
    client_environment,
    container_identity,
    container_name,
    removal_command,
    runs_in_container,
)
from serving.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
RUNTIMES = ("docker", "podman", "apptainer", "enroot")
IMAGES = {"apptainer": "results/images/serving.sif", "enroot": "results/images/serving.sqsh"}
WORKER = ContainedProgram(
    argv=["python3", "-m", "serving.worker", "run/worker-decode-0.json"],
    name="serving-0123456789ab-worker-decode-0",
    directory="/srv/chat",
    mounts=[
        Mount("/opt/serving/scripts", "/opt/serving/scripts"),
        Mount("/srv/chat/results/cache", "/srv/chat/results/cache", True),
        Mount("/srv/chat/results/engines/e1", "/srv/chat/results/engines/e1"),
        Mount("/srv/chat/results/models", "/srv/chat/results/models"),
        Mount("/srv/chat/run", "/srv/chat/run", True),
    ],
    env=["CUDA_VISIBLE_DEVICES", "LAUNCH_ID", "OMP_NUM_THREADS", "PYTHONPATH", "UCX_TLS"],
    user=(1000, 1001),
    home="/srv/chat/results/cache",
    gpus=[3, 2],
    devices=["/dev/infiniband"],
)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "3,2", "OMP_NUM_THREADS": "8"}


def container(runtime: str, **more: Any) -> ContainerConfig:
    image = IMAGES.get(runtime, "registry.example/team/serving:1.2.0")
    return parse({"container": {"runtime": runtime, "image": image, **more}}).container


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_command_line_of_a_worker_is_exactly_this(runtime: str) -> None:
    """First what the client's environment gets, then its arguments, one in a line."""
    config = container(runtime)
    env = client_environment(config, ENVIRONMENT, WORKER)
    lines = [f"{key}={value}" for key, value in sorted(env.items())]
    lines += [shlex.quote(argument) for argument in client_command(config, WORKER)]
    expected = (GOLDEN / f"worker-{runtime}.txt").read_text(encoding="utf-8")
    assert "\n".join(lines) + "\n" == expected


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_worker_without_gpus_gets_none(runtime: str) -> None:
    config, cpu = container(runtime), replace(WORKER, gpus=[], devices=[])
    text = " ".join(client_command(config, cpu))
    assert not any(word in text for word in ("--gpus", "nvidia.com", "--nv", "/dev/"))
    env = client_environment(config, {"CUDA_VISIBLE_DEVICES": ""}, cpu)
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_are_counted_from_zero_inside_in_the_order_the_worker_wants() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "5,1,3"}
    program = replace(WORKER, gpus=[5, 1, 3])
    inside = {r: client_environment(container(r), env, program) for r in RUNTIMES}
    for runtime in ("docker", "podman", "enroot"):
        assert inside[runtime]["CUDA_VISIBLE_DEVICES"] == "2,0,1"
    assert inside["apptainer"]["CUDA_VISIBLE_DEVICES"] == "5,1,3"  # --nv shows all of them
    assert inside["enroot"]["NVIDIA_VISIBLE_DEVICES"] == "1,3,5"


def test_root_needs_no_mapping_of_users() -> None:
    assert "--userns=keep-id" in client_command(container("podman"), WORKER)
    assert "--userns=keep-id" not in client_command(
        container("podman"), replace(WORKER, user=(0, 0))
    )


def test_shared_memory_of_its_own_replaces_that_of_the_host() -> None:
    flags = client_command(container("docker", shm_bytes=2**30), WORKER)
    assert "--ipc=host" not in flags
    assert {"--ipc=private", f"--shm-size={2**30}"} <= set(flags)
    with pytest.raises(ConfigError, match=r"container\.shm_bytes.*apptainer"):
        client_command(container("apptainer", shm_bytes=2**30), WORKER)


def test_limits_and_extra_flags_come_from_config() -> None:
    flags = client_command(
        container("podman", ulimits={"nofile": "1024:1024"}, extra_flags=["--tz=local"]), WORKER
    )
    assert [flag for flag in flags if flag.startswith("--ulimit")] == ["--ulimit=nofile=1024:1024"]
    assert flags[flags.index("--tz=local") + 1].startswith("registry.example/")


def test_odd_paths_survive_or_are_refused() -> None:
    program = replace(WORKER, mounts=[Mount("/data/a,b", "/data/a,b")])
    flags = client_command(container("docker"), program)
    assert '--mount=type=bind,"src=/data/a,b","dst=/data/a,b",ro' in flags
    program = replace(WORKER, mounts=[Mount("/data/a:b", "/data/a:b")])
    with pytest.raises(ConfigError, match="colon"):
        client_command(container("enroot"), program)


def test_image_that_is_not_set_names_both_ways_to_one() -> None:
    with pytest.raises(ConfigError, match=r"container\.image") as caught:
        client_command(container("docker", image=None), WORKER)
    assert "build_image" in caught.value.remedy


def test_roles_choose_who_runs_inside() -> None:
    config = container("podman", roles=["decode"])
    assert runs_in_container(config, "decode")
    assert not runs_in_container(config, "prefill")
    assert runs_in_container(container("podman"), "agg")
    assert not runs_in_container(container("none"), "agg")


def test_fingerprint_covers_what_a_running_worker_depends_on_and_nothing_else() -> None:
    config = container("podman")
    same = (replace(config, pull=True), replace(config, base_tag="1.1.0"))
    other = (replace(config, image="x"), replace(config, extra_flags=["--tz=local"]))
    assert all(
        container_identity(each, "agg") == container_identity(config, "agg") for each in same
    )
    assert all(
        container_identity(each, "agg") != container_identity(config, "agg") for each in other
    )
    assert container_identity(container("none"), "agg") == []
    assert container_identity(replace(config, roles=["decode"]), "prefill") == []


def test_name_is_the_deployments_and_valid_for_every_runtime() -> None:
    name = container_name("/srv/chat/run", "worker-agg-0")
    assert name == container_name("/srv/chat/run", "worker-agg-0")
    assert name != container_name("/srv/other/run", "worker-agg-0")
    assert name.startswith("serving-")
    assert name.endswith("-worker-agg-0")


def test_only_daemons_leave_containers_to_remove() -> None:
    assert removal_command(container("docker"), "n") == ["docker", "rm", "--force", "n"]
    assert removal_command(container("podman"), "n")[-1] == "n"
    assert (
        removal_command(container("apptainer"), "n")
        == removal_command(container("enroot"), "n")
        == []
    )
