"""A deployment of mock workers: the same rules, services and checks, and no model. It heals itself.

`tests/benchmarks/healing.py` breaks more of it, and workers of the torch engine too.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from integration.deployment import running
from integration.healing.breakable import BreakableDeployment
from integration.healing.faulty.sitecustomize import CRASH_SEED
from integration.healing.steady_load import SteadyLoad
from waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

WORKERS = ["worker-prefill-0", "worker-prefill-1", "worker-decode-0", "worker-decode-1"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableDeployment]:
    """Two processes of each role, with two instances in each."""
    deployment = BreakableDeployment(
        tmp_path_factory.mktemp("mock"),
        "mock",
        workers={"instances_per_process": 2},
        mock={"transfer_bytes_per_s": 1e8},
    )
    with running(deployment, "serve_disagg"):
        deployment.wait("8 instances", lambda state: len(state["instances"]) == 8)
        yield deployment


def test_mock_workers_serve_and_pass_the_smoke_test(service: BreakableDeployment) -> None:
    rows = service.ready()["instances"]
    names = {row["instance_id"] for row in rows}
    assert {"prefill-0", "prefill-0-1", "decode-1", "decode-1-1"} <= names
    assert len({row["epoch"] for row in rows}) == 8
    smoke = service.snakemake("smoke_test")
    assert "over mock" in smoke.stdout
    first, second = (service.complete("One two three.") for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["text"].isprintable()
    status = service.snakemake("status")
    assert "not routed to" not in status.stdout


def test_killed_and_broken_programs_are_replaced_and_no_request_fails(
    service: BreakableDeployment,
) -> None:
    """A worker of each role, etcd and NATS, at the same time. etcd's data are damaged, too."""
    before = service.pids()
    [wal] = (service.directory / "run" / "etcd" / "member" / "wal").glob("*-0000000000000000.wal")
    with wal.open("r+b") as file:
        file.write(b"\xff" * 512)
    with SteadyLoad(service.url, "tiny", num_streams=8, num_tokens=40).running() as outcomes:
        for name in ("worker-decode-0", "etcd", "nats"):
            service.kill(name)
        service.break_engine("worker-prefill-1")
        replaced = {"worker-decode-0", "worker-prefill-1", "etcd", "nats"}
        wait_until(
            lambda: (
                all(service.pids().get(name, before[name]) != before[name] for name in replaced)
                and service.whole()
            ),
            deadline_s=30,
        )
    assert outcomes.failures == []
    assert outcomes.num_right > 8
    after = service.pids()
    assert {name for name in before if before[name] != after[name]} == replaced
    assert "its engine was broken" in service.restarts("worker-prefill-1")["deaths"][0]["how"]
    page = httpx.get(f"{service.url}/metrics").text
    assert 'serving_program_restarts_total{program="etcd"} 2.0' in page
    assert "it starts empty" in (service.directory / "logs" / "watcher.log").read_text()


def test_stopped_worker_loses_its_requests_to_others_and_is_replaced(
    service: BreakableDeployment,
) -> None:
    """SIGSTOP: the process is there, and so are its connections and, for a while, its lease."""
    with SteadyLoad(service.url, "tiny", num_streams=8, num_tokens=40).running() as outcomes:
        service.time_to_recover("worker-decode-1", service.pause)
    assert outcomes.failures == []
    assert outcomes.longest_gap_s < 10


def test_poisonous_request_ends_after_two_crashes_and_the_service_stays_up(
    service: BreakableDeployment,
) -> None:
    num_before = sum(service.restarts(worker)["num_restarts"] for worker in WORKERS)
    body = {"model": "tiny", "prompt": "poison", "max_tokens": 5, "seed": CRASH_SEED}
    answers = [httpx.post(f"{service.url}/v1/completions", json=body, timeout=30) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert answers[0].json()["error"]["code"] == "request_quarantined"
    assert service.complete("One two three.")["choices"]
    wait_until(service.whole, deadline_s=30)
    num_crashes = sum(service.restarts(worker)["num_restarts"] for worker in WORKERS) - num_before
    assert num_crashes == 2
