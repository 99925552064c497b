"""The configuration that a joined node keeps in `run/` for its other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

JOINED = "joined.json"


def write_joined(config: dict[str, Any], run_dir: Path) -> None:
    """Appears whole: other commands may read it at the same time."""
    path = run_dir / JOINED
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    temporary.replace(path)


def read_joined(run_dir: Path) -> dict[str, Any] | None:
    """None on a machine that did not join."""
    try:
        config: dict[str, Any] = msgspec.json.decode((run_dir / JOINED).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    return config
