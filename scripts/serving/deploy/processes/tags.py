"""Processes of a deployment, found by tags in their environment.

Every program gets these variables and passes them on to its children, whatever their parent or
session becomes. So processes are still recognised after their supervisor was killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from msgspec import Struct

DEPLOYMENT = "SERVING_DEPLOYMENT"
"""Absolute path of the deployment's `run` folder."""
PROGRAM = "SERVING_PROGRAM"
FINGERPRINT = "SERVING_FINGERPRINT"
ENGINE = "SERVING_ENGINE"
LAUNCH = "LAUNCH_ID"
_POLL_S = 0.05


class Tag(Struct, frozen=True):
    """The tags of a process. `program` is empty for the supervisor."""

    deployment: str
    program: str
    fingerprint: str
    engine: str
    launch_id: str


def tag_of(process: psutil.Process) -> Tag | None:
    """None for a process without tags, or one that has ended or may not be inspected."""
    try:
        environ = process.environ()
    except (psutil.Error, OSError):
        return None
    if not environ.get(DEPLOYMENT):
        return None
    return Tag(
        deployment=environ[DEPLOYMENT],
        program=environ.get(PROGRAM, ""),
        fingerprint=environ.get(FINGERPRINT, ""),
        engine=environ.get(ENGINE, ""),
        launch_id=environ.get(LAUNCH, ""),
    )


def tag_of_pid(pid: int) -> Tag | None:
    try:
        return tag_of(psutil.Process(pid))
    except psutil.Error:
        return None


def deployed_processes(run_dir: Path) -> Iterator[tuple[psutil.Process, Tag]]:
    """All live processes of the deployment in `run_dir`, the supervisor included."""
    mine = str(run_dir.resolve())
    for process in psutil.process_iter():
        tag = tag_of(process)
        if tag and tag.deployment == mine and process.pid != os.getpid() and is_alive(process):
            yield process, tag


def is_alive(process: psutil.Process) -> bool:
    """A zombie counts as ended, even before its parent collects it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_processes(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """SIGTERM, and after `grace_s` SIGKILL; returns when all have ended or cannot be ended."""
    left = [process for process in processes if is_alive(process)]
    for signal_all, wait_s in ((psutil.Process.terminate, grace_s), (psutil.Process.kill, 5.0)):
        for process in left:
            try:
                signal_all(process)
            except psutil.Error:
                continue  # it has ended by itself
        ends = time.monotonic() + wait_s
        while left and time.monotonic() < ends:
            left = [process for process in left if is_alive(process)]
            if left:
                time.sleep(_POLL_S)
        if not left:
            return
