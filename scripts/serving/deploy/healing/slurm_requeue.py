"""The same for workers that are Slurm jobs: a job that failed is requeued, under its number.

Slurm itself requeues jobs whose node failed. A worker that crashed is a failed job to it.
"""

from __future__ import annotations

import logging
import time

from serving.deploy.cluster.slurm import JOBS, SlurmJobs
from serving.deploy.healing.kept_programs import kept_program
from serving.deploy.healing.restart_policy import RestartPolicy, pause_before_restart, why_down
from serving.deploy.processes.launchers import ProcessInfo
from serving.errors import OperatorError
from serving.restarts import Death, read_restart, write_restart

log = logging.getLogger("serving.healing")

LOOK_S = 5.0
"""Each look costs a command for each job."""
_FAILED = {"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "COMPLETED"}
"""States of jobs that ended and that nobody cancelled. A worker never completes by itself."""


class SlurmRequeue:
    """Looks at the jobs of the deployment every few seconds."""

    def __init__(self, jobs: SlurmJobs | None = None) -> None:
        self._jobs = jobs or SlurmJobs()
        self._next = 0.0
        self._due: dict[str, float] = {}  # Unix time, by program

    def look(self, policy: RestartPolicy) -> None:
        if time.monotonic() < self._next or not JOBS.is_dir():
            return
        self._next = time.monotonic() + LOOK_S
        try:
            infos = self._jobs.state()
        except OperatorError as exc:
            log.warning("%s", exc.what)
            return
        for name, info in infos.items():
            if info.state in _FAILED and kept_program(name) is not None:
                self._requeue_when_due(info, policy)
            else:
                self._due.pop(name, None)

    def _requeue_when_due(self, info: ProcessInfo, policy: RestartPolicy) -> None:
        name, now = info.name, time.time()
        record = read_restart(name)
        if record.down:
            return
        if name not in self._due:
            how = info.state.lower().replace("_", " ")
            record.died(Death(now, f"{info.location}: {how}, exit status {info.exit_status}"))
            pause_s = pause_before_restart(policy, record, now)
            if pause_s is None:
                record.down = why_down(policy, record, now)
                log.error("%s stays down: %s", name, record.down)
            write_restart(name, record)
            if pause_s is None:
                return
            self._due[name] = now + pause_s
        if now >= self._due[name]:
            del self._due[name]
            if refusal := self._jobs.requeue(name):
                record.down = f"Slurm does not requeue {info.location}: {refusal}"
                log.error("%s stays down: %s", name, record.down)
            else:
                record.num_restarts += 1
                log.warning("%s: requeued (%s)", name, record.deaths[-1].how)
            write_restart(name, record)
