"""Programs are killed, settings change: the service survives, and the next run restores it.

Nothing is replaced by itself here (`healing/` tests that).
"""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from integration.deployment import Deployment, running, share_results
from integration.tiny_model import save_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PROMPT = "Prefill and decode run in separate workers; blocks travel between them. One two three"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Any:
    """Two decode workers and one prefill worker of a tiny random model."""
    deployment = Deployment(
        tmp_path_factory.mktemp("faults"),
        model=str(model),
        workers={"decode": 2},
        deployment={"restart": "never"},
    )
    with running(deployment, "serve_disagg"):
        yield deployment


@pytest.fixture(autouse=True)
def whole_again(request: pytest.FixtureRequest) -> Any:
    """Each test hands the module's deployment on as it found it."""
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        service.config["workers"]["decode"] = 2
        service.snakemake("serve_disagg")


def kill(service: Deployment, *names: str) -> None:
    for name in names:
        os.kill(service.pids()[name], signal.SIGKILL)


def restarted(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_killed_worker_alone_is_restarted(service: Deployment) -> None:
    before = service.pids()
    kill(service, "worker-decode-1")
    service.wait("it is out", lambda r: len(r["instances"]) == 2, deadline_s=5)
    expected = service.complete(PROMPT)
    assert expected["choices"][0]["finish_reason"] == "length"
    service.snakemake("serve_disagg")
    assert restarted(before, service.pids()) == {"worker-decode-1"}
    service.wait("it is back", lambda r: len(r["instances"]) == 3)
    assert service.complete(PROMPT)["choices"] == expected["choices"]


def test_stream_goes_on_when_its_decode_worker_is_killed(service: Deployment) -> None:
    """The text is the same as without the failure: nothing is lost or repeated."""
    whole = service.complete(PROMPT, max_tokens=700, ignore_eos=True)["choices"][0]["text"]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 700, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    text, killed = "", False
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = httpx.Response(200, content=line[6:]).json()
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["text"]
            if not killed and len(text) > 20:
                busy = [
                    i["instance_id"]
                    for i in service.ready()["instances"]
                    if i["role"] == "decode" and i["num_running"]
                ]
                if busy:
                    kill(service, f"worker-{busy[0]}")
                    killed = True
    assert killed
    assert text == whole


def test_decode_workers_serve_alone_after_the_prefill_worker_is_lost(service: Deployment) -> None:
    expected = service.complete(PROMPT)["choices"]
    kill(service, "worker-prefill-0")
    service.wait("it is out", lambda r: len(r["instances"]) == 2, deadline_s=5)
    assert service.complete(PROMPT)["choices"] == expected


def test_requests_go_on_without_etcd_and_nats_and_the_next_run_heals(
    service: Deployment,
) -> None:
    before = service.pids()
    expected = service.complete(PROMPT)["choices"]
    kill(service, "etcd", "nats")
    time.sleep(2 * service.config["etcd"]["lease_s"])  # leases would have run out
    assert service.complete(PROMPT)["choices"] == expected
    service.snakemake("serve_disagg")
    assert restarted(before, service.pids()) == {"etcd", "nats"}
    service.wait(
        "everything is registered and synchronised",
        lambda r: len(r["instances"]) == 3 and all(i["synchronised"] for i in r["instances"]),
    )
    assert service.complete(PROMPT)["choices"] == expected


def test_killed_supervisord_is_recovered_from(service: Deployment) -> None:
    supervisor = psutil.Process(service.pids()["frontend"]).parent()
    assert supervisor is not None
    supervisor.kill()
    assert service.complete(PROMPT)["choices"]  # orphans go on serving
    service.snakemake("serve_disagg")
    assert service.complete(PROMPT)["choices"]
    names = [p.name() for p in service.processes()]
    assert len([p for p in service.processes() if "serving.frontend" in p.cmdline()]) == 1, names


def test_reboot_is_recovered_from(service: Deployment) -> None:
    """Everything is gone at once; markers, sockets and pid files stay behind."""
    for process in service.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert (service.directory / "run" / "frontend.up").exists()
    service.snakemake("serve_disagg")
    assert service.complete(PROMPT)["choices"]


def test_one_more_decode_worker_starts_one_program_and_one_less_stops_one(
    service: Deployment,
) -> None:
    service.config["workers"]["decode"] = 1
    service.snakemake("serve_disagg")
    fewer = service.pids()
    assert "worker-decode-1" not in fewer
    service.wait("it is out", lambda r: len(r["instances"]) == 2)
    service.config["workers"]["decode"] = 2
    service.snakemake("serve_disagg")
    assert restarted(fewer, service.pids()) == {"worker-decode-1"}
    service.wait("it is in", lambda r: len(r["instances"]) == 3)


def test_another_topology_stops_programs_that_no_longer_belong(service: Deployment) -> None:
    expected = service.complete(PROMPT)["choices"]
    before = service.pids()
    service.snakemake("serve_agg_router")
    after = service.pids()
    assert set(after) == {"etcd", "nats", "worker-agg-0", "frontend"}
    assert {after["etcd"], after["nats"]} == {before["etcd"], before["nats"]}
    description = service.wait("it serves", lambda r: r["ready"])
    assert (description["topology"], description["policy"]) == ("agg_router", "kv")
    assert service.complete(PROMPT)["choices"] == expected


def test_changed_model_is_rebuilt_and_served(
    service: Deployment, tmp_path: Path, model: Path
) -> None:
    before = service.complete(PROMPT)["choices"]
    pids = service.pids()
    other = save_tiny_model(tmp_path / "other", seed=1)
    service.config["model"]["id"] = str(other)
    try:
        service.snakemake("serve_disagg")
        assert service.complete(PROMPT)["choices"] != before
        assert restarted(pids, service.pids()) >= {"worker-prefill-0", "worker-decode-0"}
        assert {pids["etcd"], pids["nats"]} <= set(service.pids().values())
    finally:
        service.config["model"]["id"] = str(model)


def test_error_names_the_process_that_holds_the_frontends_port(
    service: Deployment, tmp_path: Path
) -> None:
    deployment = Deployment(tmp_path / "foreign", model=service.config["model"]["id"])
    share_results(service.directory / "results", deployment.directory / "results")
    port = deployment.config["frontend"]["port"]
    foreign = http.server.ThreadingHTTPServer(
        ("127.0.0.1", port), http.server.SimpleHTTPRequestHandler
    )
    thread = threading.Thread(target=foreign.serve_forever)
    thread.start()
    try:
        done = deployment.snakemake("serve_disagg", check=False)
        assert done.returncode != 0
        assert "frontend.port" in done.stdout
        assert str(os.getpid()) in done.stdout
        assert "Traceback" not in done.stdout
    finally:
        foreign.shutdown()
        foreign.server_close()
        thread.join()
        done = deployment.snakemake("stop")
        assert not deployment.processes()
        shutil.rmtree(deployment.directory)


def test_kv_falls_back_to_local_prefill_when_the_source_vanishes(service: Deployment) -> None:
    """A prefill worker stopped with SIGSTOP answers no pull: the decode worker computes instead."""
    expected = service.complete(PROMPT + " four five", max_tokens=8)["choices"]
    pid = service.pids()["worker-prefill-0"]
    text = PROMPT + " six seven"
    whole = service.complete(text, max_tokens=8)["choices"]
    assert whole
    os.kill(pid, signal.SIGSTOP)
    try:
        service.wait("its lease ran out", lambda r: len(r["instances"]) == 2, deadline_s=20)
        assert service.complete(PROMPT + " four five", max_tokens=8)["choices"] == expected
    finally:
        os.kill(pid, signal.SIGCONT)
    service.wait("it is back by itself", lambda r: len(r["instances"]) == 3, deadline_s=30)
