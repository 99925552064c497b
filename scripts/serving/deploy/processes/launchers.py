"""The words that both launchers share: supervisord on this machine, and Slurm.

A launcher is given a ProgramSpec and describes what runs in a ProcessInfo. Which program is needed,
and when it is ready, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

RUN = Path("run")
LOGS = Path("logs")
WATCHER = "watcher"
"""The program that starts the others again. Like supervisord it is part of the machinery: it is in
no plan, and no launcher lists it."""


class ProgramSpec(Struct, frozen=True, kw_only=True):
    """What to run. Durations in seconds; `env` adds to the launcher's own environment.

    `owns_log`: the program writes its log itself and not through supervisord. When the supervisor
    that reads its log dies, a Go program dies with its next log line, and a Python program does
    not. `removal` is a command that removes what may outlive the process: its container.
    `num_gpus` is the number of GPUs that the program computes on; only Slurm needs it.
    `by_supervisord`: supervisord starts it again whenever it ends, as it does only for the watcher.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    fingerprint: str
    stop_s: float
    engine: str = ""
    owns_log: bool = False
    removal: Sequence[str] = ()
    num_gpus: int = 0
    by_supervisord: bool = False


class ProcessInfo(Struct, frozen=True, kw_only=True):
    """A program as its launcher sees it.

    `pid` is the process or the Slurm job; 0 when none runs, and then the tags are empty, too.
    `started` is a Unix time. `location` says where it runs when that is not this machine.
    """

    name: str
    state: str
    pid: int
    started: float
    exit_status: int
    spawn_error: str
    fingerprint: str = ""
    engine: str = ""
    launch_id: str = ""
    location: str = ""

    @property
    def running(self) -> bool:
        """The process lives and is not being stopped."""
        return self.state in {"STARTING", "RUNNING"} and self.pid > 0


class Launcher(Protocol):
    """Starts and stops the programs of the deployment in the working directory."""

    poll_s: float
    """How often its state is worth asking for."""

    def ensure(self) -> None:
        """Make it ready to start programs. Raises OperatorError when it cannot be used here."""

    def state(self) -> dict[str, ProcessInfo]:
        """Every program it knows, by name."""

    def pending_reason(self, name: str) -> str:
        """Why a started program waits for resources; empty when it does not wait."""

    def start(self, spec: ProgramSpec) -> ProcessInfo:
        """Start a program in place of any of that name. Returns at once, not when it is ready."""

    def stop(self, names: Sequence[str]) -> None:
        """Stop these programs at the same time and forget them."""
