"""The secrets of a deployment: made at its first start, in files that only this user can read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

NATS_TOKEN_FILE = "run/secrets/nats_token"
RPC_SECRET_FILE = "run/secrets/rpc_secret"
FILES = (NATS_TOKEN_FILE, RPC_SECRET_FILE)


def ensure_named(settings: str) -> None:
    """Make those of `FILES` that are missing and that a program's settings name."""
    for file in FILES:
        if file in settings:
            ensure(file)


def ensure(file: str) -> str:
    """The secret in `file`, which is made when it does not exist."""
    path = Path(file)
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Programs are started side by side: the file appears with its content, and only once.
        made = path.with_suffix(f".{os.getpid()}.tmp")
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            handle.write(secrets.token_urlsafe(32))
        with suppress(FileExistsError):
            os.link(made, path)
        made.unlink()
    return path.read_text().strip()
