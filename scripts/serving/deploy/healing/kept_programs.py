"""The programs that are kept running: `run/programs/{program}.keep`.

A program is kept from when it was proven ready until somebody stops it. So a deliberate stop and a
failed start are never taken for failures: both have removed the file by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.deploy.planning.program import Program
from serving.deploy.processes.launchers import RUN, ProgramSpec
from serving.deploy.processes.supervisor_conf import PROGRAMS


class KeptProgram(Struct, frozen=True, kw_only=True):
    """All that is needed to start the program again, and to prove it ready."""

    program: Program
    spec: ProgramSpec


def keep_file(name: str) -> Path:
    return PROGRAMS / f"{name}.keep"


def keep(kept: KeptProgram) -> None:
    """From now on the program is started again when it ends by itself."""
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    path = keep_file(kept.program.name)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(kept))
    temporary.replace(path)


def let_go(names: Iterable[str]) -> None:
    """These programs may end."""
    for name in names:
        keep_file(name).unlink(missing_ok=True)


def kept_program(name: str) -> KeptProgram | None:
    """None for a program that may end, or that another version of this code started."""
    try:
        return msgspec.json.decode(keep_file(name).read_bytes(), type=KeptProgram)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_traces(name: str) -> None:
    """The files by which a program shows that it is ready."""
    for suffix in ("ready", "sock", "up"):
        (RUN / f"{name}.{suffix}").unlink(missing_ok=True)
