"""An executable and its version, whatever its source."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from msgspec import Struct

Version = tuple[int, int, int]
_COMMAND_S = 10.0


class Binary(Struct, frozen=True):
    """An executable that answered `--version`. `origin` says where it was found."""

    path: Path
    version: str
    origin: str


class Unavailable(Exception):
    """This source does not have the executable; another one may."""


def ask_version(path: Path, pattern: str) -> Version:
    """What `--version` prints; `pattern` has three groups. Raises Unavailable."""
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_COMMAND_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as exc:
        raise Unavailable(f"{path} does not run: {exc}") from None
    match = re.search(pattern, answer.stdout)
    if match is None:
        raise Unavailable(f"{path} printed no version")
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)


def version_text(version: Version) -> str:
    """`3.5.21`."""
    return ".".join(map(str, version))
