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
AUTHORITY_FILE = "run/secrets/authority.pem"
ETCD_SERVER_FILE = "run/secrets/etcd.pem"
JOIN_FILE = "run/secrets/join.pem"


def ensure_named(settings: str) -> None:
    """Make those of `FILES` that are missing and that a program's settings name."""
    for file in FILES:
        if file in settings:
            ensure(file)
    if ETCD_SERVER_FILE in settings:
        _ensure_certificates()


def ensure(file: str) -> str:
    """The secret in `file`, which is made when it does not exist."""
    if not Path(file).exists():
        put(file, secrets.token_urlsafe(32))
    return Path(file).read_text().strip()


def put(file: str, secret: str, *, replace: bool = False) -> None:
    """Write a file that only this user can read; one that exists stays, unless `replace`."""
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Programs are started side by side: the file appears with its content, and only once.
    made = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(secret)
    if replace:
        made.replace(path)
        return
    with suppress(FileExistsError):
        os.link(made, path)
    made.unlink()


def _ensure_certificates() -> None:
    """All three or none: only etcd's own start makes them, and a part fits no other part."""
    files = (AUTHORITY_FILE, ETCD_SERVER_FILE, JOIN_FILE)
    if all(Path(file).exists() for file in files):
        return
    from serving.deploy import certificates  # slow to load, and rarely needed

    made = certificates.make()
    for file, text in zip(files, (made.authority, made.server, made.join), strict=True):
        put(file, text, replace=True)


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
