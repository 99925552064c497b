"""Workers as Slurm jobs: submitted, watched and cancelled.

The deployment's folder lies on a file system that all nodes see. A job is one worker. It finds out
its address and its GPUs on its node (`slurm_worker`). A job that is requeued or preempted keeps its
number and registers again by itself.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import Config
from serving.deploy.cluster.slurm_commands import COMMAND_S, batch_script, run_slurm, show_job
from serving.deploy.processes.launchers import RUN, ProcessInfo, ProgramSpec
from serving.deploy.processes.tags import FINGERPRINT, LAUNCH, PROGRAM
from serving.errors import OperatorError

JOBS = RUN / "slurm"
END_S = 60.0
"""The time that Slurm has to end a job for good, after the job's own time to drain."""
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED"}
_RUNNING = {"RUNNING", "SIGNALING"}
_ENDING = {"COMPLETING", "STAGE_OUT"}
_ALIVE = _PENDING | _RUNNING | _ENDING


class SubmittedJob(Struct, frozen=True, kw_only=True):
    """`run/slurm/{program}.json`: what was submitted. `started` is a Unix time."""

    job_id: int
    fingerprint: str
    engine: str
    launch_id: str
    stop_s: float
    started: float


class SlurmJobs:
    """A Launcher: the jobs of the deployment in the working directory.

    Only `start` needs a `config`. Every command of Slurm has `command_s` to return.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        poll_s: float = 0.5,
        end_s: float = END_S,
        command_s: float = COMMAND_S,
    ) -> None:
        self._config = config or Config()
        self.poll_s, self._end_s, self._command_s = poll_s, end_s, command_s

    def ensure(self) -> None:
        """Raises OperatorError where there is no Slurm."""
        for command in ("sbatch", "scontrol", "scancel"):
            if shutil.which(command) is None:
                raise OperatorError(
                    f"`cluster.launcher: slurm` needs `{command}`, which is not on PATH",
                    remedy="run this on a node that submits jobs, or set `cluster.launcher: local`",
                )

    # --- looking -------------------------------------------------------------------------------

    def state(self) -> dict[str, ProcessInfo]:
        """Every worker that was submitted and not stopped since; its `pid` is the job's number."""
        found = {}
        for path in sorted(JOBS.glob("*.json")):
            try:
                job = msgspec.json.decode(path.read_bytes(), type=SubmittedJob)
            except (OSError, msgspec.MsgspecError):
                continue
            found[path.stem] = self._info(path.stem, job)
        return found

    def pending_reason(self, name: str) -> str:
        """Why a job does not run yet, in Slurm's words; empty once it does."""
        job = _submitted(name)
        shown = show_job(job.job_id, self._command_s) if job is not None else {}
        if shown.get("JobState") not in _PENDING:
            return ""
        return f"{shown['JobState'].lower()}: {shown.get('Reason', '')}"

    def _info(self, name: str, job: SubmittedJob) -> ProcessInfo:
        shown = show_job(job.job_id, self._command_s)
        state, node = shown.get("JobState", "GONE"), shown.get("NodeList", "")
        live = state in _PENDING | _RUNNING
        status = shown.get("ExitCode", "0:0").partition(":")[0]
        return ProcessInfo(
            name=name,
            state=("RUNNING" if state in _RUNNING else "STARTING") if live else state,
            pid=job.job_id if live else 0,
            started=job.started,
            exit_status=int(status) if status.isdigit() else 0,
            spawn_error="",
            fingerprint=job.fingerprint if live else "",
            engine=job.engine if live else "",
            launch_id=job.launch_id if live else "",
            location=f"job {job.job_id}"
            + (f" on {node}" if node not in {"", "(null)"} else f" ({state.lower()})"),
        )

    # --- changing ------------------------------------------------------------------------------

    def start(self, spec: ProgramSpec) -> ProcessInfo:
        """Submit it; returns at once. Raises OperatorError with Slurm's words when it refuses."""
        self.stop([spec.name])
        JOBS.mkdir(parents=True, exist_ok=True)
        launch_id = secrets.token_hex(16)
        tags = {PROGRAM: spec.name, FINGERPRINT: spec.fingerprint, LAUNCH: launch_id}
        spec = msgspec.structs.replace(spec, env={**spec.env, **tags})
        script = batch_script(spec, self._config)
        _file(spec.name, "sh").write_text(script)
        done = run_slurm(["sbatch", "--parsable"], script, command_s=self._command_s)
        if done.returncode != 0:
            raise OperatorError(
                f"Slurm refuses {spec.name}: {done.stderr.strip()}",
                remedy=f"see the `slurm` section of the config, and {_file(spec.name, 'sh')}",
            )
        job = SubmittedJob(
            job_id=int(done.stdout.split(";")[0]),
            fingerprint=spec.fingerprint,
            engine=spec.engine,
            launch_id=launch_id,
            stop_s=spec.stop_s,
            started=time.time(),
        )
        _file(spec.name, "json").write_bytes(msgspec.json.encode(job))
        return self._info(spec.name, job)

    def requeue(self, name: str) -> str:
        """Let a job that ended run again, under its number. Returns Slurm's words when it refuses."""
        job = _submitted(name)
        if job is None:
            return "it was not submitted"
        done = run_slurm(["scontrol", "requeue", str(job.job_id)], command_s=self._command_s)
        return done.stderr.strip() or "no reason" if done.returncode else ""

    def stop(self, names: Sequence[str]) -> None:
        """Let these jobs drain together, then cancel what is left.

        Unknown names are ignored. Raises OperatorError for a job that does not end.
        """
        jobs = {name: job for name in names if (job := _submitted(name)) is not None}
        running = {name: job for name, job in jobs.items() if self._state(job) in _RUNNING}
        for job in running.values():
            # The batch script has become the worker by now, and a plain cancel would spare it.
            self._cancel(job, "--batch", "--signal=TERM")
        self._wait_ended(running, max((job.stop_s for job in running.values()), default=0.0))
        for job in jobs.values():
            self._cancel(job)
        if left := self._wait_ended(jobs, self._end_s):
            described = ", ".join(f"job {job.job_id} ({name})" for name, job in left.items())
            raise OperatorError(
                f"Slurm does not end {described}",
                remedy="see `squeue` and `scontrol show job`, and run `snakemake stop` again",
            )
        for name in jobs:
            for suffix in ("json", "sh"):
                _file(name, suffix).unlink(missing_ok=True)

    def _cancel(self, job: SubmittedJob, *options: str) -> None:
        run_slurm(["scancel", *options, str(job.job_id)], command_s=self._command_s)

    def _state(self, job: SubmittedJob) -> str:
        return show_job(job.job_id, self._command_s).get("JobState", "GONE")

    def _wait_ended(
        self, jobs: Mapping[str, SubmittedJob], deadline_s: float
    ) -> dict[str, SubmittedJob]:
        """The jobs that are still alive after `deadline_s`."""
        ends = time.monotonic() + deadline_s
        left = dict(jobs)
        while True:
            left = {name: job for name, job in left.items() if self._state(job) in _ALIVE}
            if not left or time.monotonic() > ends:
                return left
            time.sleep(self.poll_s)


def _file(name: str, suffix: str) -> Path:
    return JOBS / f"{name}.{suffix}"


def _submitted(name: str) -> SubmittedJob | None:
    path = _file(name, "json")
    return msgspec.json.decode(path.read_bytes(), type=SubmittedJob) if path.exists() else None
