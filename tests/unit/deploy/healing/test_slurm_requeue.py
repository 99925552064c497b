"""Workers that are Slurm jobs: failed ones are requeued, cancelled and stopped ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.healing import slurm_requeue
from serving.deploy.healing.kept_programs import KeptProgram, keep, let_go
from serving.deploy.healing.restart_policy import RestartPolicy
from serving.deploy.healing.slurm_requeue import SlurmRequeue
from serving.deploy.planning.program import Program
from serving.deploy.processes.launchers import ProgramSpec
from serving.restarts import read_restart
from unit.deploy.fake_programs import Script

NAME = "worker-decode-0"
SPEC = ProgramSpec(name=NAME, command=["python"], env={}, fingerprint="f", stop_s=1)
PROGRAM = Program(
    name=NAME,
    command=[],
    fingerprint="f",
    host="",
    ports={},
    settings="",
    settings_file="",
    engine="",
    start_s=1.0,
    stop_s=1.0,
)
POLICY = RestartPolicy(restart="on_failure", max_restarts=1)


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> SlurmJobs:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_requeue, "LOOK_S", 0.0)
    for name in ("run", "logs"):
        Path(name).mkdir()
    Path("state").write_text("RUNNING")
    script("sbatch", "cat >/dev/null; echo 7")
    script("scancel", "echo CANCELLED >state")
    script(
        "scontrol",
        'case "$1" in requeue) test ! -e refuse || { echo too old >&2; exit 1; }; '
        "echo PENDING >state;; "
        '*) echo "JobId=7 JobState=$(cat state) ExitCode=1:0 NodeList=n1";; esac',
    )
    made = SlurmJobs(poll_s=0.01, end_s=0.1)
    made.start(SPEC)
    keep(KeptProgram(program=PROGRAM, spec=SPEC))
    return made


def test_failed_job_is_requeued_until_the_budget_is_spent(jobs: SlurmJobs) -> None:
    requeue = SlurmRequeue(jobs)
    requeue.look(POLICY)
    assert read_restart(NAME).deaths == [], "it runs"
    Path("state").write_text("OUT_OF_MEMORY")
    requeue.look(POLICY)
    assert Path("state").read_text().strip() == "PENDING"
    record = read_restart(NAME)
    assert (record.num_restarts, record.down) == (1, "")
    assert record.deaths[0].how == "job 7 on n1: out of memory, exit status 1"
    requeue.look(POLICY)  # it waits in the queue
    Path("state").write_text("FAILED")
    for _ in range(2):
        requeue.look(POLICY)
    assert Path("state").read_text() == "FAILED"
    record = read_restart(NAME)
    assert record.down.startswith("restarted once in 3 minutes, last exit: job 7 on n1: failed")
    assert len(record.deaths) == 2


def test_refusal_of_slurm_is_on_record(jobs: SlurmJobs) -> None:
    Path("refuse").touch()
    Path("state").write_text("FAILED")
    SlurmRequeue(jobs).look(POLICY)
    assert "too old" in read_restart(NAME).down


def test_cancelled_job_and_one_that_may_end_are_left_alone(jobs: SlurmJobs) -> None:
    requeue = SlurmRequeue(jobs)
    Path("state").write_text("CANCELLED")
    requeue.look(POLICY)
    let_go([NAME])
    Path("state").write_text("FAILED")
    requeue.look(POLICY)
    assert read_restart(NAME).deaths == []
