"""Workers in real containers: podman, with an image made here and this machine's own Python.

Skipped, with podman's own words, where it is not installed or may not run containers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from integration.containers.podman import (
    IMAGE,
    containers,
    limits,
    python_mounts,
    root_of,
    usable_podman,
    worker_inside,
)
from integration.deployment import Deployment, running
from integration.tiny_model import save_tiny_model
from serving.config import parse
from serving.deploy.containers.library_runner import PROGRAM, LibraryRunner
from serving.deploy.containers.worker_command import contain
from serving.deploy.planning.source_digest import SCRIPTS
from serving.engine.trtllm.build.installed import PYTHON
from standin.install import install
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROMPT = "One two three"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with usable_podman(tmp_path_factory.mktemp("podman")):
        yield


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, runtime: None) -> Deployment:
    """Decode in a container, prefill outside; nothing started yet."""
    folder = tmp_path_factory.mktemp("contained")
    container = {
        "runtime": "podman",
        "image": IMAGE,
        "roles": ["decode"],
        "python": sys.executable,
        "ulimits": limits(),
        "mounts": python_mounts(),
    }
    return Deployment(
        folder / "deployment", model=str(save_tiny_model(folder / "model")), container=container
    )


@pytest.fixture(scope="module")
def service(deployment: Deployment) -> Iterator[Deployment]:
    with running(deployment, "serve_disagg"):
        yield deployment
    assert containers(deployment.directory) == []


def test_check_passes_and_says_which_image_it_is(service: Deployment) -> None:
    report = json.loads((service.directory / "results/checks/container.json").read_text())
    assert report["ok"], report
    found = {finding["name"]: finding for finding in report["checks"]}
    assert found["image"]["detail"].startswith(IMAGE)
    assert {"run", "shared memory", "locked memory", "ucxx"} <= set(found)


def test_decode_runs_in_a_container_and_prefill_outside(service: Deployment) -> None:
    here = root_of(psutil.Process())
    assert root_of(worker_inside(service, "worker-decode-0")) != here
    assert root_of(worker_inside(service, "worker-prefill-0")) == here
    assert containers(service.directory) == ["worker-decode-0"]


def test_kv_moves_between_a_container_and_the_host(service: Deployment) -> None:
    done = service.snakemake("smoke_test")
    assert "UCX" in done.stdout.upper()
    service.complete(PROMPT * 20)
    service.wait("the report of the bytes", lambda ready: kv_bytes(ready) > 0)


def test_second_serve_is_a_no_op(service: Deployment) -> None:
    before = service.pids()
    assert "Nothing to be done" in service.snakemake("serve_disagg").stdout
    assert service.pids() == before


def test_killed_client_leaves_its_container_and_the_next_serve_replaces_it(
    service: Deployment,
) -> None:
    expected = service.complete(PROMPT)["choices"]
    inside = worker_inside(service, "worker-decode-0")
    client = psutil.Process(service.pids()["worker-decode-0"])
    assert "podman" in client.name()
    client.kill()
    wait_until(lambda: not client.is_running() or client.status() == psutil.STATUS_ZOMBIE)
    assert inside.is_running(), "podman's container goes on without its client"
    service.snakemake("serve_disagg")
    assert not inside.is_running()
    assert containers(service.directory) == ["worker-decode-0"]
    service.wait("both workers serve", lambda ready: len(ready["instances"]) == 2)
    assert service.complete(PROMPT)["choices"] == expected


def test_changed_container_settings_restart_only_the_contained_worker(service: Deployment) -> None:
    before = service.pids()
    service.config["container"]["extra_flags"] = ["--label=changed=yes"]
    service.snakemake("serve_disagg")
    after = service.pids()
    assert {name for name in before if before[name] != after[name]} == {"worker-decode-0"}
    assert containers(service.directory) == ["worker-decode-0"]


def test_stop_leaves_no_container(service: Deployment) -> None:
    """Also one whose client is gone. The fixture starts nothing again, and stops what is left."""
    psutil.Process(service.pids()["worker-decode-0"]).kill()
    service.stop()
    assert containers(service.directory) == []


def test_image_without_the_chosen_python_is_an_error_of_one_paragraph(
    deployment: Deployment,
) -> None:
    config = {**deployment.config["container"], "python": "/nonesuch/python3"}
    other = Deployment(
        deployment.directory.parent / "other",
        model=deployment.config["model"]["id"],
        container=config,
    )
    done = other.snakemake("results/checks/container.json", check=False)
    assert done.returncode != 0
    assert "/nonesuch/python3" in done.stdout
    assert "container.python" in done.stdout
    assert "Traceback" not in done.stdout
    assert containers(other.directory) == []


def kv_bytes(ready: dict[str, Any]) -> int:
    """Bytes of KV that the decode worker fetched, as `/ready` reports them."""
    return sum(i["kv_bytes_received"] for i in ready["instances"] if i["role"] == "decode")


LISTENING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("listening", flush=True)
time.sleep(60)
"""


def test_signals_and_exit_codes_pass_through(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    container = parse({"container": deployment.config["container"]}).container
    failing = contain(container, [sys.executable, "-c", "raise SystemExit(7)"], name="x", env={})
    assert subprocess.run(failing.command, check=False).returncode == 7
    waiting = contain(container, [sys.executable, "-c", LISTENING], name="x", env={})
    with subprocess.Popen(waiting.command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "listening\n"
        client.terminate()
        assert client.wait(timeout=30) == 5
    assert containers(tmp_path) == []


def test_next_build_succeeds_after_a_build_whose_client_was_killed(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse({"container": deployment.config["container"]})
    lost = contain(config.container, [sys.executable, "-c", LISTENING], name=PROGRAM, env={})
    with subprocess.Popen(lost.command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "listening\n"
        client.kill()
    assert containers(tmp_path) == [PROGRAM]
    done = LibraryRunner(config, gpus=[], writable=[tmp_path])([PYTHON, "-c", "print('built')"])
    assert (done.returncode, done.stdout) == (0, "built\n")
    assert containers(tmp_path) == []


def test_container_writes_files_as_the_user_and_cannot_change_the_code(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    container = parse({"container": deployment.config["container"]}).container
    program = "import pathlib, serving; pathlib.Path('run/x').touch()\n"
    program += "pathlib.Path(serving.__path__[0], 'x').touch()"
    env = {"PYTHONPATH": str(SCRIPTS)}
    argv = [sys.executable, "-c", program]
    inside = contain(container, argv, name="x", env=env, writable=[Path("run")])
    done = subprocess.run(
        inside.command,
        env={**os.environ, **inside.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Read-only file system" in done.stderr
    assert (tmp_path / "run" / "x").stat().st_uid == os.getuid()


# --- the production engine, with the stand-in for its library -----------------------------------


@pytest.fixture(scope="module")
def standin(
    tmp_path_factory: pytest.TempPathFactory, deployment: Deployment
) -> Iterator[Deployment]:
    """As above with `engine.backend: tensorrt_llm`; its build asks the library inside, too."""
    folder = tmp_path_factory.mktemp("standin")
    library = str(install(folder / "library", "1.2.1"))
    settings = deployment.config["container"]
    inside = Deployment(
        folder / "deployment",
        model=deployment.config["model"]["id"],
        engine={"backend": "tensorrt_llm", "device": "cpu"},
        container={**settings, "mounts": {**settings["mounts"], library: library}},
    )
    inside.environment = {"PYTHONPATH": library}
    with running(inside, "serve_disagg"):
        yield inside
    assert containers(inside.directory) == []


def test_library_is_imported_in_the_container_and_its_version_is_reported(
    standin: Deployment,
) -> None:
    report = json.loads((standin.directory / "results/checks/container.json").read_text())
    found = {finding["name"]: finding for finding in report["checks"]}
    assert found["tensorrt_llm"]["detail"] == "1.2.1"


def test_library_moves_kv_between_a_container_and_the_host(standin: Deployment) -> None:
    here = root_of(psutil.Process())
    assert root_of(worker_inside(standin, "worker-decode-0")) != here
    assert root_of(worker_inside(standin, "worker-prefill-0")) == here
    standin.snakemake("smoke_test")
    standin.complete(PROMPT * 20)
    standin.wait("the report of the bytes", lambda ready: kv_bytes(ready) > 0)
    assert containers(standin.directory) == ["worker-decode-0"]
