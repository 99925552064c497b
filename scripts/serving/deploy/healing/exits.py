"""How a program ended, in words. supervisord reports each end by a signal as the status -1."""

from __future__ import annotations

import re
from pathlib import Path

from serving.deploy.processes.supervisor_conf import LOG

TAIL_BYTES = 65536
BROKEN_ENGINE_STATUS = 70
"""As `worker/health.py` has it."""
VMSTAT = Path("/proc/vmstat")


def how_it_ended(
    program: str, exit_status: int, *, out_of_memory: bool | None = None, log: Path = LOG
) -> str:
    """`exit status 1` or `killed by SIGSEGV`, from supervisord's log.

    `out_of_memory`: whether the kernel has ended a process for want of memory about then; None
    when nobody looked.
    """
    cause = _last_end(program, log) if exit_status == -1 else ""
    if exit_status == BROKEN_ENGINE_STATUS:
        return f"its engine was broken (exit status {exit_status})"
    if not cause:
        return f"exit status {exit_status}" if exit_status != -1 else "killed by a signal"
    if cause == "SIGKILL" and out_of_memory is not False:
        return "killed by SIGKILL, probably out of memory"
    return f"killed by {cause}"


def _last_end(program: str, log: Path) -> str:
    """The signal of the program's last end; empty when the log does not have it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = re.findall(rf"exited: {re.escape(program)} \(terminated by (\w+)", text)
    return found[-1] if found else ""


def num_out_of_memory() -> int:
    """Processes that the kernel has ended for want of memory since it booted, in all cgroups."""
    try:
        text = VMSTAT.read_text()
    except OSError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0
