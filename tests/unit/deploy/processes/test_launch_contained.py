"""A contained program's life under supervisord, with a runtime that is a shell script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving.config import Config
from serving.deploy.processes.launch import launch
from serving.deploy.processes.launchers import RUN
from serving.deploy.processes.stop import stop_all
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes, is_alive
from serving.errors import OperatorError
from unit.deploy.fake_programs import Script
from unit.deploy.processes.contained_worker import config, worker
from waiting import wait_until

# What runs "inside" is no child of the client, as with a daemon; a signal to the client is one to it.
DOCKER = """
case $1 in
run)
    echo "$CUDA_VISIBLE_DEVICES|$LAUNCH_ID" >"$CALLS.env"
    setsid -f sh -c 'trap "exit 0" TERM; echo $$ >"$CALLS.pid"
        printf "{\\"launch_id\\": \\"%s\\"}" "$LAUNCH_ID" >run/worker-agg-0.ready
        while :; do sleep 0.1; done' 2>/dev/null
    trap 'kill $(cat "$CALLS.pid"); exit 0' TERM
    while :; do sleep 0.1; done ;;
rm) [ -e "$CALLS.refuse" ] && { echo "daemon is gone" >&2; exit 1; }
    echo "Error: No such container: $3" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Iterator[Path]:
    deployment = tmp_path / "deployment"
    deployment.mkdir()
    monkeypatch.chdir(deployment)
    script("docker", DOCKER)
    yield tmp_path
    (tmp_path / "calls.refuse").unlink(missing_ok=True)
    Supervisor().shutdown()
    assert not list(deployed_processes(RUN))


def calls(here: Path) -> list[str]:
    return (here / "calls").read_text().splitlines()


def inside(here: Path) -> psutil.Process:
    return psutil.Process(int((here / "calls.pid").read_text()))


def test_worker_is_started_by_the_client_and_stopped_through_it(here: Path) -> None:
    launch(worker(), config(), print)
    [started] = [line for line in calls(here) if line.startswith("docker run")]
    assert started.endswith("h/x:1 python3 -m serving.worker run/worker-agg-0.json")
    assert (here / "calls.env").read_text() != "|\n", "the launch reaches the container"
    process = inside(here)
    assert Supervisor().orphans() == [], "what runs inside is not taken for a stray"
    Supervisor().stop(["worker-agg-0"])
    assert not is_alive(process)
    name = started.split("--name=")[1].split()[0]
    assert calls(here)[-1] == f"docker rm --force {name}"


def test_a_container_of_that_name_is_removed_before_the_start(here: Path) -> None:
    launch(worker(), config(), print)
    kinds = [line.split()[1] for line in calls(here)]
    assert kinds == ["rm", "run"]


def test_killed_client_leaves_nothing_after_stop(here: Path) -> None:
    launch(worker(), config(), print)
    process = inside(here)
    client = psutil.Process(Supervisor().state()["worker-agg-0"].pid)
    client.kill()
    wait_until(lambda: not is_alive(client))
    assert is_alive(process), "as with a daemon, it goes on without its client"
    assert {tag.program for _, tag in Supervisor().orphans()} == {"worker-agg-0"}
    stop_all(config(), print)
    assert not is_alive(process)
    assert calls(here)[-1].startswith("docker rm --force serving-")


def test_stop_removes_containers_of_a_config_that_has_changed_since(here: Path) -> None:
    launch(worker(), config(), print)
    stop_all(Config(), print)
    assert calls(here)[-1].startswith("docker rm --force serving-")
    assert {path.name for path in RUN.glob("*")} <= {"secrets"}


def test_container_that_cannot_be_removed_is_told_with_the_command(here: Path) -> None:
    launch(worker(), config(), print)
    (here / "calls.refuse").touch()
    with pytest.raises(OperatorError, match="daemon is gone") as caught:
        Supervisor().stop(["worker-agg-0"])
    assert "docker rm --force serving-" in caught.value.remedy
    (here / "calls.refuse").unlink()
    Supervisor().stop(["worker-agg-0"])  # it is still written down, and removed now


def test_ready_file_of_the_worker_is_believed_only_with_its_launch(here: Path) -> None:
    launch(worker(), config(), print)
    ready = json.loads(Path("run/worker-agg-0.ready").read_text())
    assert ready["launch_id"] == Supervisor().state()["worker-agg-0"].launch_id
