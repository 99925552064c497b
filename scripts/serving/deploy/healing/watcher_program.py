"""The watcher as a program of supervisord, which starts it again if it ends."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from pathlib import Path

from serving.deploy.planning.source_digest import SCRIPTS
from serving.deploy.processes.launchers import RUN, WATCHER, ProgramSpec
from serving.deploy.processes.supervisor import Supervisor

_CODE = Path(__file__).parents[1]
_STOP_S = 2.0


def ensure_watcher(supervisor: Supervisor) -> None:
    """Have a watcher of this code run."""
    fingerprint = _code_digest()
    RUN.mkdir(mode=0o700, exist_ok=True)
    with (RUN / "watcher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # rules that start programs run side by side
        supervisor.ensure()
        info = supervisor.watcher()
        if info is not None and info.running and info.fingerprint == fingerprint:
            return
        supervisor.start(
            ProgramSpec(
                name=WATCHER,
                command=[sys.executable, "-m", "serving.deploy.healing"],
                env={
                    "PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPTS)),
                    "PYTHONUNBUFFERED": "1",
                },
                fingerprint=fingerprint,
                stop_s=_STOP_S,
                by_supervisord=True,
            )
        )


def _code_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("healing", "processes"):
        for path in sorted((_CODE / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
