"""Workers as Slurm jobs: submitted, watched and cancelled, with the shape of `Supervisor`.

The deployment's folder lies on a file system that all nodes see. A job is one worker; where it
runs, and with what address and GPUs, it finds out there (`slurm_worker`). A job that is requeued
or preempted keeps its number and registers again by itself. Every command has a deadline.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from serving.config import Config
from serving.deploy.processes.processes import FINGERPRINT, LAUNCH, PROGRAM
from serving.deploy.processes.supervisor import LOGS, RUN, ProcessInfo, ProgramSpec
from serving.errors import OperatorError

JOBS = RUN / "slurm"
COMMAND_S = 30.0
END_S = 60.0
"""After its time to drain, Slurm gets this long to end a job for good."""
_POLL_S = 0.5
_WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"}
_RUNS = {"RUNNING", "SIGNALING"}
_ENDS = {"COMPLETING", "STAGE_OUT"}
_ALIVE = _WAITS | _RUNS | _ENDS
_SUBMITTER = "PATH,HOME,USER,LANG,LD_LIBRARY_PATH"
"""What a job takes from the environment of whoever submits it."""
_FIELD = re.compile(r"(\w+)=(\S*)")


class Job(Struct, frozen=True, kw_only=True):
    """`run/slurm/{program}.json`: what was submitted. `started` is a Unix time."""

    job_id: int
    fingerprint: str
    engine: str
    launch_id: str
    stop_s: float
    started: float


def batch_script(spec: ProgramSpec, config: Config, num_gpus: int) -> str:
    """What `sbatch` is given on standard input. `num_gpus` is what the worker computes on."""
    slurm = config.slurm
    options = {
        "job-name": f"{config.deployment.namespace}-{spec.name.removeprefix('worker-')}",
        "output": str((LOGS / f"{spec.name}.log").absolute()),
        "open-mode": "append",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time_limit,
        "nodelist": slurm.nodelist,
        "mem": slurm.memory,
        "cpus-per-task": slurm.cpus_per_task,
        "gres": slurm.gres or (f"gpu:{num_gpus}" if num_gpus else None),
        "export": _SUBMITTER,
    }
    several = slurm.mpi != "none" and num_gpus > 1
    options |= {"nodes": 1, "ntasks": num_gpus if several else 1}
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {flag}" for flag in slurm.extra_flags)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())]
    launcher = ["srun", f"--mpi={slurm.mpi}", "trtllm-llmapi-launch"] if several else []
    return "\n".join([*lines, f"exec {shlex.join([*launcher, *spec.command])}", ""])


def inside_allocation() -> bool:
    """Whether this runs in an allocation, whose steps workers can be."""
    return "SLURM_JOB_ID" in os.environ


def step_command(config: Config, num_gpus: int) -> list[str]:
    """What runs a worker as a step of the allocation that this process is in."""
    slurm = config.slurm
    gres = slurm.gres or (f"gpu:{num_gpus}" if num_gpus else None)
    options = {
        "nodes": 1,
        "ntasks": 1,
        "nodelist": slurm.nodelist,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "gres": gres,
    }
    chosen = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # Exactly what it needs, so that steps lie side by side; a step that cannot be placed says so.
    return ["srun", "--exact", "--immediate=60", *chosen]


class SlurmJobs:
    """The jobs of the deployment in the working directory. Only `start` needs a `config`."""

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()

    def ensure(self) -> None:
        """Raises OperatorError where there is no Slurm."""
        for command in ("sbatch", "scontrol", "scancel"):
            if shutil.which(command) is None:
                raise OperatorError(
                    f"`cluster.launcher: slurm` needs `{command}`, which is not here",
                    remedy="run this on a node that submits jobs, or set `cluster.launcher: local`",
                )

    # --- looking -------------------------------------------------------------------------------

    def state(self) -> dict[str, ProcessInfo]:
        """Every worker that was submitted and not stopped since; its `pid` is the job's number."""
        found = {}
        for path in sorted(JOBS.glob("*.json")):
            try:
                job = msgspec.json.decode(path.read_bytes(), type=Job)
            except (OSError, msgspec.MsgspecError):
                continue
            found[path.stem] = self._info(path.stem, job)
        return found

    def obstacle(self, name: str) -> str:
        """Why a job does not run yet, in Slurm's word; empty once it does."""
        path = JOBS / f"{name}.json"
        if not path.exists():
            return ""
        shown = _show(msgspec.json.decode(path.read_bytes(), type=Job).job_id)
        waits = shown.get("JobState") in _WAITS
        return f"{shown['JobState'].lower()}: {shown.get('Reason', '')}" if waits else ""

    def _info(self, name: str, job: Job) -> ProcessInfo:
        shown = _show(job.job_id)
        state, node = shown.get("JobState", "GONE"), shown.get("NodeList", "")
        live = state in _WAITS | _RUNS
        status = shown.get("ExitCode", "0:0").partition(":")[0]
        return ProcessInfo(
            name=name,
            state=("RUNNING" if state in _RUNS else "STARTING") if live else state,
            pid=job.job_id if live else 0,
            started=job.started,
            exit_status=int(status) if status.isdigit() else 0,
            spawn_error="",
            fingerprint=job.fingerprint if live else "",
            engine=job.engine if live else "",
            launch_id=job.launch_id if live else "",
            place=f"job {job.job_id}"
            + (f" on {node}" if node not in {"", "(null)"} else f" ({state.lower()})"),
        )

    # --- changing ------------------------------------------------------------------------------

    def start(self, spec: ProgramSpec, num_gpus: int = 0) -> ProcessInfo:
        """Submit it; returns at once. Raises OperatorError with Slurm's words when it refuses."""
        self.stop([spec.name])
        JOBS.mkdir(parents=True, exist_ok=True)
        launch_id = secrets.token_hex(16)
        tags = {PROGRAM: spec.name, FINGERPRINT: spec.fingerprint, LAUNCH: launch_id}
        spec = msgspec.structs.replace(spec, env={**spec.env, **tags})
        script = batch_script(spec, self._config, num_gpus)
        (JOBS / f"{spec.name}.sh").write_text(script)
        done = _run(["sbatch", "--parsable"], script)
        if done.returncode != 0:
            raise OperatorError(
                f"Slurm does not take {spec.name}: {done.stderr.strip()}",
                remedy=f"see the `slurm` section of the config, and {JOBS / spec.name}.sh",
            )
        job = Job(
            job_id=int(done.stdout.split(";")[0]),
            fingerprint=spec.fingerprint,
            engine=spec.engine,
            launch_id=launch_id,
            stop_s=spec.stop_s,
            started=time.time(),
        )
        (JOBS / f"{spec.name}.json").write_bytes(msgspec.json.encode(job))
        return self._info(spec.name, job)

    def stop(self, names: Sequence[str]) -> None:
        """Let these drain together, then cancel what is left. Raises OperatorError for a job that
        does not end."""
        jobs: dict[str, Job] = {}
        for name in names:
            path = JOBS / f"{name}.json"
            if path.exists():
                jobs[name] = msgspec.json.decode(path.read_bytes(), type=Job)
        running = {n: j for n, j in jobs.items() if _show(j.job_id).get("JobState") in _RUNS}
        for job in running.values():
            # To the batch script, which is the worker by then; a plain cancel spares it.
            _run(["scancel", "--batch", "--signal=TERM", str(job.job_id)])
        _wait_ended(running, max((job.stop_s for job in running.values()), default=0.0))
        for job in jobs.values():
            _run(["scancel", str(job.job_id)])
        left = _wait_ended(jobs, END_S)
        if left:
            raise OperatorError(
                f"Slurm does not end {', '.join(f'job {j.job_id} ({n})' for n, j in left.items())}",
                remedy="see `squeue` and `scontrol show job`, and run `snakemake stop` again",
            )
        for name in jobs:
            for suffix in ("json", "sh"):
                (JOBS / f"{name}.{suffix}").unlink(missing_ok=True)


def _wait_ended(jobs: Mapping[str, Job], deadline_s: float) -> dict[str, Job]:
    """Those that live on after `deadline_s`."""
    ends = time.monotonic() + deadline_s
    left = dict(jobs)
    while True:
        left = {n: j for n, j in left.items() if _show(j.job_id).get("JobState") in _ALIVE}
        if not left or time.monotonic() > ends:
            return left
        time.sleep(_POLL_S)


def _show(job_id: int) -> dict[str, str]:
    """What `scontrol show job` says; empty for a job that Slurm has forgotten."""
    done = _run(["scontrol", "--oneliner", "show", "job", str(job_id)])
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return {}
        raise OperatorError(
            f"Slurm does not answer: {done.stderr.strip()}", remedy="is slurmctld up? `sinfo` tells"
        )
    return dict(_FIELD.findall(done.stdout))


def _run(command: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise OperatorError(
            f"`{shlex.join(command)}` did not return within {COMMAND_S:g} s",
            remedy="is slurmctld up? `sinfo` tells",
        ) from None
