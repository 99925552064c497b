"""What is on record about programs that ended by themselves: `run/restarts/{program}.json`.

The watcher of a deployment writes it (`deploy/healing/`); `status`, `doctor` and `/metrics` show it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

RESTARTS = Path("run/restarts")
MAX_DEATHS = 32
"""How many deaths of a program are kept, the newest ones."""


class Death(Struct, frozen=True):
    """`at` is a Unix time; `how` is for people: `killed by SIGKILL`, `exit status 1`."""

    at: float
    how: str


class RestartRecord(Struct, kw_only=True):
    """Since a person last started the program. `down`: why it is not started again; empty while
    it is."""

    deaths: list[Death] = []
    num_restarts: int = 0
    down: str = ""

    def died(self, death: Death) -> None:
        self.deaths = [*self.deaths, death][-MAX_DEATHS:]


def read_restarts(folder: Path = RESTARTS) -> dict[str, RestartRecord]:
    """By program; programs that never ended by themselves are missing."""
    return {path.stem: read_restart(path.stem, folder) for path in sorted(folder.glob("*.json"))}


def read_restart(program: str, folder: Path = RESTARTS) -> RestartRecord:
    try:
        return msgspec.json.decode((folder / f"{program}.json").read_bytes(), type=RestartRecord)
    except (OSError, msgspec.MsgspecError):
        return RestartRecord()


def write_restart(program: str, record: RestartRecord, folder: Path = RESTARTS) -> None:
    """Appears whole: others may read it at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{program}.{os.getpid()}.tmp"
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(folder / f"{program}.json")


def forget_restarts(program: str, folder: Path = RESTARTS) -> None:
    """A person starts or stops the program: what was before does not count any more."""
    (folder / f"{program}.json").unlink(missing_ok=True)
