"""Wait until a started program has its resources, and until it is ready."""

from __future__ import annotations

import time

from serving.config import Config
from serving.deploy.healing.exits import how_it_ended
from serving.deploy.planning.program import Program
from serving.deploy.processes.launchers import Launcher, ProcessInfo
from serving.deploy.processes.program_log import ProgramLog
from serving.deploy.processes.readiness import probe_for
from serving.errors import OperatorError
from serving.progress import Report

OUT_OF_SPACE = "NOSPACE"
"""etcd's alarm, which stays raised when there is room again."""
REPORT_EVERY_S = 5.0
REPORT_PENDING_EVERY_S = 30.0


def wait_for_resources(launcher: Launcher, name: str, config: Config, report: Report) -> None:
    """Returns once Slurm has found room for the program. Raises OperatorError after `pending_s`."""
    started, reported, last = time.monotonic(), 0.0, ""
    while reason := launcher.pending_reason(name):
        now = time.monotonic()
        if now - started > config.slurm.pending_s:
            raise OperatorError(
                f"{name} still pends after {config.slurm.pending_s:g} s ({reason})",
                remedy="see `squeue --start`; ask for less under `slurm`, or raise "
                "`slurm.pending_s`",
            )
        if reason != last or now - reported >= REPORT_PENDING_EVERY_S:
            report(f"{name}: {reason} ({now - started:.0f} s)")
            reported, last = now, reason
        time.sleep(launcher.poll_s)


def wait_until_ready(
    launcher: Launcher, program: Program, info: ProcessInfo, log: ProgramLog, report: Report
) -> None:
    """Raises OperatorError as soon as the process ends, or when `start_s` have passed."""
    probe = probe_for(program.name)
    started = reported = time.monotonic()
    while missing := probe(program, info.launch_id):
        now = time.monotonic()
        current = launcher.state().get(program.name)
        if current is None or not current.running or current.pid != info.pid:
            how = "it was stopped"
            if current is not None:
                how = how_it_ended(program.name, current.exit_status)
            raise log.startup_failure(program.name, how)
        if OUT_OF_SPACE in missing:
            raise OperatorError(
                f"{program.name} stores nothing any more: {missing}",
                remedy="free space on the disk of `run/`, or delete run/etcd: it only holds leases",
            )
        if now - started > program.start_s:
            raise OperatorError(
                f"{program.name} was not ready after {program.start_s:g} s: {missing}",
                remedy=f"see {log.path}; if it only needs longer, raise `deployment.start_s`",
            )
        if now - reported >= REPORT_EVERY_S:
            reported = now
            activity = log.newest_line() or missing
            report(f"{program.name}: {activity[:100]} ({now - started:.0f} s)")
        time.sleep(launcher.poll_s)
