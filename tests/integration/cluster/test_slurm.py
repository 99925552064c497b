"""`serve_disagg_multinode` through a real slurmctld with two slurmd nodes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from integration.cluster.network import outside_address
from integration.cluster.slurm_cluster import queue, run, slurm
from integration.deployment import REPO, Deployment
from integration.readme import snakemake_arguments
from integration.tiny_model import save_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("slurm")
    deployment = Deployment(
        folder / "shared",
        str(save_tiny_model(folder / "tiny")),
        slurm={"cpus_per_task": 2, "time_limit": "30"},
    )
    with slurm(folder / "slurm"):
        try:
            serve, *_ = snakemake_arguments("slurm", outside_address())
            deployment.snakemake(*serve)
            deployment.config["cluster"] = {"address": outside_address(), "launcher": "slurm"}
            deployment.config["slurm"]["partition"] = "debug"
            yield deployment
        finally:
            deployment.snakemake("stop", check=False)
            left = queue()
    assert not left


def jobs() -> dict[str, list[str]]:
    """By worker: number, state and node of its job."""
    return {
        name.removeprefix("serving-"): [number, state, *node]
        for number, name, state, *node in (line.split() for line in queue())
    }


def test_each_worker_is_a_job_on_a_node_and_the_service_works(service: Deployment) -> None:
    running = jobs()
    assert set(running) == {"prefill-0", "decode-0"}
    assert {state for _, state, _ in running.values()} == {"RUNNING"}
    assert {node for _, _, node in running.values()} == {"n1", "n2"}
    assert "over ucx" in service.snakemake("smoke_test").stdout
    _, status, _ = snakemake_arguments("slurm", "")
    output = service.snakemake(*status).stdout
    for number, _, node in running.values():
        assert f"job {number} on {node}" in output


def test_worker_gets_no_variables_of_slurm(service: Deployment) -> None:
    """What makes MPI and its like believe that they are a task of a parallel job."""
    import psutil

    workers = [
        process
        for process in psutil.process_iter()
        if process.status() != psutil.STATUS_ZOMBIE
        and "serving.worker" in process.cmdline()
        and str(service.directory) == process.cwd()
    ]
    assert len(workers) == 2
    for worker in workers:
        environment = worker.environ()
        assert not [name for name in environment if name.startswith(("SLURM_", "PMI"))]
        assert environment["OMP_NUM_THREADS"] == "2"


def test_second_serve_submits_nothing(service: Deployment) -> None:
    before = jobs()
    done = service.snakemake("serve_disagg_multinode")
    assert "Nothing to be done" in done.stdout
    assert jobs() == before


def test_requeued_job_serves_again(service: Deployment) -> None:
    """As after a preemption: the same job, perhaps elsewhere, and the frontend finds it."""
    expected = service.complete("One two three", max_tokens=8)["choices"]
    number = jobs()["prefill-0"][0]
    started = time.monotonic()
    run("scontrol", "requeue", number)
    service.wait("it is out", lambda r: len(r["instances"]) == 1, 30)
    assert service.complete("One two three", max_tokens=8)["choices"] == expected
    service.wait("it is back", lambda r: len(r["instances"]) == 2, 150)
    print(f"\nrequeued: routed to again after {time.monotonic() - started:.0f} s")
    assert jobs()["prefill-0"][:2] == [number, "RUNNING"]
    assert service.complete("One two three", max_tokens=8)["choices"] == expected


def test_killed_job_is_submitted_again_by_the_next_serve(service: Deployment) -> None:
    before = jobs()
    run("scancel", "--signal=KILL", "--full", before["decode-0"][0])
    service.wait("it is out", lambda r: len(r["instances"]) == 1, 30)
    service.snakemake("serve_disagg_multinode")
    after = jobs()
    assert after["prefill-0"] == before["prefill-0"]
    assert after["decode-0"][0] != before["decode-0"][0]
    service.wait("it is back", lambda r: len(r["instances"]) == 2, 20)


def test_pending_job_reports_its_reason_and_fails_at_the_deadline(service: Deployment) -> None:
    """Three workers do not fit two nodes."""
    service.config["workers"] = {"decode": 2}
    service.config["slurm"]["pending_s"] = 8
    try:
        done = service.snakemake("serve_disagg_multinode", check=False)
        assert done.returncode != 0
        assert "pending: Resources" in done.stdout or "pending: Priority" in done.stdout
        assert "`slurm.pending_s`" in done.stdout
    finally:
        service.config["workers"] = {}
        del service.config["slurm"]["pending_s"]
    assert set(jobs()) == {"prefill-0", "decode-0"}, "what gave up is cancelled"
    service.snakemake("serve_disagg_multinode")


def test_refused_job_is_an_error_that_quotes_slurm(service: Deployment) -> None:
    service.config["workers"] = {"decode": 2}
    service.config["slurm"]["extra_flags"] = ["--constraint=unobtainium"]
    try:
        done = service.snakemake("serve_disagg_multinode", check=False)
    finally:
        service.config["workers"] = {}
        del service.config["slurm"]["extra_flags"]
    assert done.returncode != 0
    assert "Slurm does not take worker-decode-1: " in done.stdout
    assert "Traceback" not in done.stdout
    service.snakemake("serve_disagg_multinode")


def test_stop_leaves_the_queue_empty(service: Deployment) -> None:
    """The last one that needs the service of this module."""
    *_, stop = snakemake_arguments("slurm", "")
    assert "nothing is left" in service.snakemake(*stop).stdout
    assert queue() == []


def test_whole_workflow_runs_inside_one_allocation(service: Deployment) -> None:
    """Workers are steps of it; nothing is submitted."""
    output = service.directory / "output"
    serve, *_ = snakemake_arguments("slurm", outside_address())
    commands = [[*serve], ["smoke_test"], ["status"], ["stop"]]
    common = ["--cores", "all", "--snakefile", str(REPO / "Snakefile")]
    common += ["--configfile", str(service.directory / "config.yaml")]
    lines = [shlex.join([sys.executable, "-m", "snakemake", *c, *common]) for c in commands]
    script = "\n".join(["set -e", *lines[:3], "squeue -h -s -o 'step %i' >>steps", lines[3]])
    with output.open("wb") as log:
        done = subprocess.run(
            ["salloc", "--nodes=2", "--ntasks=2", "--cpus-per-task=2", "bash", "-c", script],
            cwd=service.directory,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            timeout=200,
        )
    text = output.read_text()
    assert done.returncode == 0, text + service.logs()
    assert "smoke test passed" in text
    assert "nothing is left" in text
    assert "Submitted batch job" not in text
    assert not service.processes()
