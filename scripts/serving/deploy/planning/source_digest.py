"""A digest of the code a program runs, so that new code restarts the programs that use it."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
SCRIPTS = PACKAGE.parent
"""The folder that makes `serving` importable."""

_UNUSED = {
    "worker": {"console.py", "deploy", "frontend", "kv_router", "simulate", "text"},
    "frontend": {"console.py", "deploy", "engine", "kv_transfer", "simulate", "worker"},
}


def source_digest(program: str, package: Path = PACKAGE) -> str:
    """16 hex digits over the modules that `worker` or `frontend` may use (2 ms)."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.c")]):
        relative = path.relative_to(package)
        if relative.parts[0] not in _UNUSED[program]:
            digest.update(str(relative).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
