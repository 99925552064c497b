"""What Slurm is given and what is made of its answers, by programs that play Slurm."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from serving.config import parse
from serving.config.process import WorkerSettings
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.cluster.slurm_commands import batch_script
from serving.deploy.cluster.slurm_worker import (
    address_towards,
    settings_on_this_node,
    without_job_variables,
)
from serving.deploy.processes.launchers import ProgramSpec
from serving.errors import OperatorError
from unit.deploy.processes.contained_worker import worker as worker_program

SPEC = ProgramSpec(
    name="worker-decode-0",
    command=[
        "python",
        "-m",
        "serving.deploy.cluster.slurm_worker",
        "run/worker-decode-0.json",
        "10.0.0.1",
    ],
    env={"PYTHONPATH": "/a b", "OMP_WAIT_POLICY": "PASSIVE"},
    fingerprint="f",
    engine="e",
    stop_s=1,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "logs", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    play(tmp_path, "sbatch", "cat > given; echo '7;cluster'")
    play(tmp_path, "scancel", 'echo "$@" >> cancelled; echo CANCELLED > state')
    play(tmp_path, "scontrol", "echo JobId=7 JobState=$(cat state) Reason=Resources NodeList=n1")
    (tmp_path / "state").write_text("PENDING")
    return tmp_path


def slurm_jobs(command_s: float = 30.0) -> SlurmJobs:
    return SlurmJobs(poll_s=0.01, end_s=0.1, command_s=command_s)


def play(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_batch_script_follows_the_config(here: Path) -> None:
    config = parse(
        {
            "slurm": {
                "partition": "gpu",
                "account": "lab",
                "cpus_per_task": 8,
                "time_limit": "1-0",
                "extra_flags": ["--constraint=h100"],
            }
        }
    )
    assert batch_script(replace(SPEC, num_gpus=2), config) == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=serving-decode-0\n"
        f"#SBATCH --output={here}/logs/worker-decode-0.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --account=lab\n"
        "#SBATCH --time=1-0\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --gres=gpu:2\n"
        "#SBATCH --export=PATH,HOME,USER,LANG,LD_LIBRARY_PATH\n"
        "#SBATCH --nodes=1\n"
        "#SBATCH --ntasks=1\n"
        "#SBATCH --requeue\n"
        "#SBATCH --constraint=h100\n"
        "export OMP_WAIT_POLICY=PASSIVE\n"
        "export PYTHONPATH='/a b'\n"
        "exec python -m serving.deploy.cluster.slurm_worker run/worker-decode-0.json 10.0.0.1\n"
    )


def test_engine_of_several_gpus_is_a_parallel_job_when_mpi_is_asked_for() -> None:
    script = batch_script(replace(SPEC, num_gpus=4), parse({"slurm": {"mpi": "pmix"}}))
    assert "#SBATCH --ntasks=4\n" in script
    assert "exec srun --mpi=pmix trtllm-llmapi-launch python -m serving" in script
    assert "srun" not in batch_script(replace(SPEC, num_gpus=1), parse({"slurm": {"mpi": "pmix"}}))
    assert "gres" not in batch_script(SPEC, parse({}))


def test_job_pends_runs_and_ends(here: Path) -> None:
    jobs = slurm_jobs()
    info = jobs.start(SPEC)
    assert (info.pid, info.running, info.location) == (7, True, "job 7 on n1")
    assert jobs.pending_reason(SPEC.name) == "pending: Resources"
    assert f"LAUNCH_ID={info.launch_id}" in (here / "given").read_text()
    (here / "state").write_text("RUNNING")
    assert jobs.pending_reason(SPEC.name) == ""
    assert jobs.state() == {SPEC.name: info_running(jobs)}
    (here / "state").write_text("COMPLETING")
    assert not jobs.state()[SPEC.name].running
    jobs.stop([SPEC.name, "unknown"])
    assert jobs.state() == {}


def info_running(jobs: SlurmJobs):  # type: ignore[no-untyped-def]
    info = jobs.state()[SPEC.name]
    assert (info.state, info.pid, info.fingerprint) == ("RUNNING", 7, "f")
    return info


def test_running_job_may_drain_before_it_is_cancelled(here: Path) -> None:
    jobs = slurm_jobs()
    jobs.start(SPEC)
    (here / "state").write_text("RUNNING")
    jobs.stop([SPEC.name])
    assert (here / "cancelled").read_text() == "--batch --signal=TERM 7\n7\n"


def test_a_job_that_does_not_end_is_an_error(here: Path) -> None:
    play(here, "scancel", "true")
    jobs = slurm_jobs()
    jobs.start(SPEC)
    with pytest.raises(OperatorError, match=r"does not end job 7 \(worker-decode-0\)"):
        jobs.stop([SPEC.name])
    assert SPEC.name in jobs.state(), "so that it can be tried again"


def test_a_refused_job_is_quoted_in_slurms_words(here: Path) -> None:
    play(here, "sbatch", "echo 'Invalid partition specified' >&2; exit 1")
    with pytest.raises(OperatorError, match="refuses worker-decode-0: Invalid partition"):
        slurm_jobs().start(SPEC)
    assert slurm_jobs().state() == {}


def test_a_broken_or_hanging_slurm_is_an_error_in_time(here: Path) -> None:
    jobs = slurm_jobs()
    jobs.start(SPEC)
    play(here, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(OperatorError, match="Unable to contact"):
        jobs.state()
    play(here, "scontrol", "exec sleep 5")
    with pytest.raises(OperatorError, match=r"did not return within 0\.2 s"):
        slurm_jobs(command_s=0.2).state()


def test_forgotten_job_has_ended(here: Path) -> None:
    jobs = slurm_jobs()
    jobs.start(SPEC)
    play(here, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert not jobs.state()[SPEC.name].running
    jobs.stop([SPEC.name])
    assert jobs.state() == {}


def test_a_machine_without_slurm_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OperatorError, match="needs `sbatch`"):
        SlurmJobs().ensure()


def test_worker_finds_out_where_it_is() -> None:
    settings = msgspec.json.decode(worker_program().settings, type=WorkerSettings)
    on_gpu = msgspec.structs.replace(settings, device="cuda")
    found = settings_on_this_node(on_gpu, "10.0.0.5", {"CUDA_VISIBLE_DEVICES": "3,5"})
    assert (found.host, found.kv_host, found.gpus) == ("10.0.0.5", "10.0.0.5", [0, 1])
    assert settings_on_this_node(settings, "10.0.0.5", {"CUDA_VISIBLE_DEVICES": "3,5"}).gpus == []
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_variables_of_the_job_do_not_reach_the_worker() -> None:
    job = {"SLURM_JOB_ID": "1", "PMIX_RANK": "0", "SLURM_CPUS_PER_TASK": "6", "UCX_TLS": "tcp"}
    assert without_job_variables(job) == {"UCX_TLS": "tcp", "OMP_NUM_THREADS": "6"}
    assert without_job_variables(job | {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"
