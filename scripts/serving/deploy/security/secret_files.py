"""Secrets and certificates of a deployment, in files that only this user can read.

A program's first start makes the files that its settings name. An empty file is no secret: it is
what a power cut leaves of one that was never on the disk, so it is made anew.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """The secret in `file`, which is made when there is none."""
    if secret := _content(file):
        return secret
    with _one_at_a_time(Path(file).parent):
        if not (secret := _content(file)):
            write_secret(file, secret := secrets.token_urlsafe(32), anew=True)
    return secret


def _content(file: str) -> str:
    """Empty when there is no file, or nothing in it."""
    try:
        return Path(file).read_text().strip("\0 \t\r\n")  # zeros are what some file systems leave
    except FileNotFoundError:
        return ""


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Programs are started side by side, and must agree."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_secret(file: str, secret: str, *, anew: bool = False) -> None:
    """Write a file that only this user can read. An existing file stays, unless `anew`.

    It is on the disk when this returns. Raises ValueError for an empty secret.
    """
    if not secret.strip():
        raise ValueError(f"there is no secret to write to {file}")
    path = Path(file)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Programs are started side by side: the file appears with its content, and only once.
    made = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
        handle.write(secret)
        handle.flush()
        os.fsync(handle.fileno())
    if anew:
        made.replace(path)
    else:
        with suppress(FileExistsError):
            os.link(made, path)
        made.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _ensure_certificates() -> None:
    """All three or none, since they belong together. Only the start of etcd makes them."""
    files = (AUTHORITY_FILE, ETCD_SERVER_FILE, JOIN_FILE)
    if all(map(_content, files)):
        return
    from serving.deploy.security import certificates  # slow to load, and rarely needed

    made = certificates.make_etcd_certificates()
    for file, text in zip(files, (made.authority, made.server, made.join), strict=True):
        write_secret(file, text, anew=True)


def _ensure_api_certificate(host: str) -> None:
    """A certificate for `host`; a new one when the API listened elsewhere before."""
    from serving.deploy.security import certificates  # slow to load, and rarely needed

    path = Path(API_CERTIFICATE_FILE)
    if _content(API_CERTIFICATE_FILE) and certificates.is_certificate_for(path.read_text(), host):
        return
    made = certificates.make_api_certificate(host)
    write_secret(API_AUTHORITY_FILE, made.authority, anew=True)
    write_secret(API_CERTIFICATE_FILE, made.server, anew=True)
