"""Secrets and certificates of a deployment, in files that only this user can read.

A program's first start makes the files that its settings name.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

NATS_TOKEN_FILE = "run/secrets/nats_token"
RPC_SECRET_FILE = "run/secrets/rpc_secret"
API_KEYS_FILE = "run/secrets/api_keys"
FILES = (NATS_TOKEN_FILE, RPC_SECRET_FILE, API_KEYS_FILE)
AUTHORITY_FILE = "run/secrets/authority.pem"
ETCD_SERVER_FILE = "run/secrets/etcd.pem"
JOIN_FILE = "run/secrets/join.pem"
API_AUTHORITY_FILE = "run/secrets/api_authority.pem"
API_CERTIFICATE_FILE = "run/secrets/api.pem"


def ensure_named_secrets(settings: str, host: str = "127.0.0.1") -> None:
    """Make the missing secrets and certificates that the `settings` of a program name.

    The program listens on `host`.
    """
    for file in FILES:
        if file in settings:
            ensure_secret(file)
    if ETCD_SERVER_FILE in settings:
        _ensure_certificates()
    if API_CERTIFICATE_FILE in settings:
        _ensure_api_certificate(host)


def ensure_secret(file: str) -> str:
    """The secret in `file`, which is created when it does not exist."""
    if not Path(file).exists():
        write_secret(file, secrets.token_urlsafe(32))
    return Path(file).read_text().strip()


def write_secret(file: str, secret: str, *, anew: bool = False) -> None:
    """Write a file that only this user can read. An existing file stays, unless `anew`."""
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Programs are started side by side: the file appears with its content, and only once.
    made = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(secret)
    if anew:
        made.replace(path)
        return
    with suppress(FileExistsError):
        os.link(made, path)
    made.unlink()


def _ensure_certificates() -> None:
    """All three or none, since they belong together. Only the start of etcd makes them."""
    files = (AUTHORITY_FILE, ETCD_SERVER_FILE, JOIN_FILE)
    if all(Path(file).exists() for file in files):
        return
    from serving.deploy.security import certificates  # slow to load, and rarely needed

    made = certificates.make_etcd_certificates()
    for file, text in zip(files, (made.authority, made.server, made.join), strict=True):
        write_secret(file, text, anew=True)


def _ensure_api_certificate(host: str) -> None:
    """A certificate for `host`; a new one when the API listened elsewhere before."""
    from serving.deploy.security import certificates  # slow to load, and rarely needed

    path = Path(API_CERTIFICATE_FILE)
    if path.exists() and certificates.is_certificate_for(path.read_text(), host):
        return
    made = certificates.make_api_certificate(host)
    write_secret(API_AUTHORITY_FILE, made.authority, anew=True)
    write_secret(API_CERTIFICATE_FILE, made.server, anew=True)
