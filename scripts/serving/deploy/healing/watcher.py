"""Starts programs again that ended by themselves, or that live and give no sign of life.

It looks at supervisord twice a second instead of listening to its events: those say nothing about a
program that is stopped or stuck, and a listener that is slow holds up supervisord.

A program is replaced only while it is kept (`kept_programs.py`) and the policy in the record of the
deployment has it so. The restarted program is a new launch with a marker of its own, which appears
when it is ready.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from serving.deploy.healing.etcd_data import set_etcd_data_aside
from serving.deploy.healing.exits import how_it_ended, num_out_of_memory
from serving.deploy.healing.kept_programs import KeptProgram, kept_program, remove_traces
from serving.deploy.healing.restart_policy import (
    RestartPolicy,
    in_words,
    pause_before_restart,
    why_down,
)
from serving.deploy.healing.signs_of_life import SignsOfLife
from serving.deploy.healing.slurm_requeue import SlurmRequeue
from serving.deploy.processes.launchers import RUN, ProcessInfo
from serving.deploy.processes.markers import write_marker
from serving.deploy.processes.startup import OUT_OF_SPACE
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.topology_record import read_record
from serving.errors import OperatorError
from serving.restarts import Death, read_restart, write_restart

log = logging.getLogger("serving.healing")

POLL_S = 0.5
TRACE_S = 0.5
"""Time that a silent program has to write where it is stuck, before it is killed."""
_ENDED = {"EXITED", "FATAL", "BACKOFF", "UNKNOWN"}


@dataclass
class _Ended:
    """A program that waits for its next start; `life` is the Unix time of its last one."""

    life: float
    due: float


@dataclass
class _Starting:
    """A restarted program that is not ready yet. `since` is monotonic."""

    info: ProcessInfo
    since: float


class Watcher:
    """Of the deployment in the working directory. Call `look` twice a second."""

    def __init__(self, supervisor: Supervisor, clock: Callable[[], float] = time.time) -> None:
        self._supervisor, self._clock = supervisor, clock
        self._signs = SignsOfLife()
        self._slurm = SlurmRequeue()
        self._ended: dict[str, _Ended] = {}
        self._starting: dict[str, _Starting] = {}
        self._reasons: dict[str, str] = {}  # why it was killed, by program
        self._num_out_of_memory = num_out_of_memory()

    def look(self) -> None:
        """Do what is due now."""
        record = read_record(RUN)
        policy = record.restart if record is not None else RestartPolicy()
        if policy.restart == "never":
            return
        for name, info in self._supervisor.state().items():
            kept = kept_program(name)
            if kept is None:
                self._forget(name)
            elif info.running:
                self._look_at_running(kept, info, policy)
            elif info.state in _ENDED:
                self._look_at_ended(kept, info, policy)
        self._slurm.look(policy)

    def _forget(self, name: str) -> None:
        for known in (self._ended, self._starting, self._reasons):
            known.pop(name, None)
        self._signs.forget(name)

    # --- programs that ended -------------------------------------------------------------------

    def _look_at_ended(self, kept: KeptProgram, info: ProcessInfo, policy: RestartPolicy) -> None:
        name, now = info.name, self._clock()
        ended = self._ended.get(name)
        if ended is None or ended.life != info.started:
            record = read_restart(name)
            if record.down:
                return
            record.died(Death(now, self._how(info)))
            pause_s = pause_before_restart(policy, record, now)
            if pause_s is None:
                record.down = why_down(policy, record, now)
                log.error("%s stays down: %s", name, record.down)
            else:
                log.warning("%s ended: %s; it starts again", name, record.deaths[-1].how)
            write_restart(name, record)
            remove_traces(name)
            self._set_data_aside_if_damaged(name, info)
            self._starting.pop(name, None)
            self._signs.forget(name)
            ended = self._ended[name] = _Ended(info.started, now + (pause_s or 0.0))
            if pause_s is None:
                return
        if now >= ended.due and not read_restart(name).down:
            self._start(kept)

    def _how(self, info: ProcessInfo) -> str:
        before, self._num_out_of_memory = self._num_out_of_memory, num_out_of_memory()
        if reason := self._reasons.pop(info.name, ""):
            return reason
        if info.spawn_error and not info.started:
            return info.spawn_error
        was_memory = self._num_out_of_memory > before
        return how_it_ended(info.name, info.exit_status, out_of_memory=was_memory)

    def _set_data_aside_if_damaged(self, name: str, info: ProcessInfo) -> None:
        """etcd ended before it was ready: most likely its data are damaged."""
        if name == "etcd" and name in self._starting and set_etcd_data_aside():
            log.warning("etcd did not start with its data; it starts empty, and all register again")

    def _start(self, kept: KeptProgram) -> None:
        name = kept.program.name
        try:
            info = self._supervisor.restart(kept.spec)
        except OperatorError as exc:
            log.error("%s", exc)
            record = read_restart(name)
            record.down = exc.what
            write_restart(name, record)
            return
        if info is None:
            return  # somebody stops it
        del self._ended[name]
        record = read_restart(name)
        record.num_restarts += 1
        write_restart(name, record)
        self._starting[name] = _Starting(info, time.monotonic())
        log.info("%s: started again (pid %d)", name, info.pid)

    # --- programs that run -----------------------------------------------------------------------

    def _look_at_running(self, kept: KeptProgram, info: ProcessInfo, policy: RestartPolicy) -> None:
        name = info.name
        self._ended.pop(name, None)
        starting = self._starting.get(name)
        if starting is not None and starting.info.pid == info.pid:
            self._prove(kept, starting)
        elif silence := self._signs.missing(kept.program, info, policy.silent_s):
            self._replace(info, silence)

    def _prove(self, kept: KeptProgram, starting: _Starting) -> None:
        """Write the marker of a restarted program once it is ready."""
        name, waited_s = kept.program.name, time.monotonic() - starting.since
        if self._signs.is_ready(kept.program, starting.info.launch_id):
            del self._starting[name]
            write_marker(starting.info, RUN)
            log.info("%s: ready after %.1f s", name, waited_s)
        elif waited_s > kept.program.start_s and name != "frontend":  # it may wait for workers
            self._replace(starting.info, f"not ready after {in_words(kept.program.start_s)}")

    def _replace(self, info: ProcessInfo, why: str) -> None:
        """Kill it; the next look finds that it ended."""
        log.error("%s: %s; it is killed", info.name, why)
        self._reasons[info.name] = why
        if OUT_OF_SPACE in why and set_etcd_data_aside():
            log.warning("etcd's data are full; it starts empty, and all register again")
        try:
            process = psutil.Process(info.pid)
            if info.name.startswith("worker-"):
                process.send_signal(signal.SIGABRT)  # its log then shows where it is stuck
                process.wait(TRACE_S)
        except psutil.Error:
            pass  # it is stopped, or it has ended meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.killpg(info.pid, signal.SIGKILL)  # supervisord makes each program lead a group
