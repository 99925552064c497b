"""The secrets of a deployment: made at its first start, in files that only this user can read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from serving.config import FrontendConfig, is_loopback

NATS_TOKEN_FILE = "run/secrets/nats_token"
RPC_SECRET_FILE = "run/secrets/rpc_secret"
API_KEYS_FILE = "run/secrets/api_keys"
FILES = (NATS_TOKEN_FILE, RPC_SECRET_FILE, API_KEYS_FILE)


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


def api_keys_file(frontend: FrontendConfig) -> str | None:
    """Where the keys of the API are: off loopback there are always some."""
    if frontend.api_keys_file is None and not is_loopback(frontend.host):
        return API_KEYS_FILE
    return frontend.api_keys_file


def authorization(frontend: FrontendConfig) -> dict[str, str]:
    """The headers that let this deployment's own commands in. Empty when it needs none, or has
    no keys yet."""
    if (file := api_keys_file(frontend)) is None:
        return {}
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text().splitlines()]
    except OSError:
        return {}
    key = next((line for line in lines if line and not line.startswith("#")), "")
    return {"authorization": f"Bearer {key}"} if key else {}
