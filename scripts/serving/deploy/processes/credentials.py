"""The secrets of a deployment: made at its first start, in files that only this user can read."""

from __future__ import annotations

import os
import secrets
import ssl
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from serving.config import FrontendConfig, is_loopback

NATS_TOKEN_FILE = "run/secrets/nats_token"
RPC_SECRET_FILE = "run/secrets/rpc_secret"
API_KEYS_FILE = "run/secrets/api_keys"
FILES = (NATS_TOKEN_FILE, RPC_SECRET_FILE, API_KEYS_FILE)
AUTHORITY_FILE = "run/secrets/authority.pem"
ETCD_SERVER_FILE = "run/secrets/etcd.pem"
JOIN_FILE = "run/secrets/join.pem"
API_AUTHORITY_FILE = "run/secrets/api_authority.pem"
API_CERTIFICATE_FILE = "run/secrets/api.pem"


def ensure_named(settings: str, host: str = "127.0.0.1") -> None:
    """Make those secrets and certificates that are missing and that the settings of a program,
    which listens on `host`, name."""
    for file in FILES:
        if file in settings:
            ensure(file)
    if ETCD_SERVER_FILE in settings:
        _ensure_certificates()
    if API_CERTIFICATE_FILE in settings:
        _ensure_api_certificate(host)


def ensure(file: str) -> str:
    """The secret in `file`, which is made when it does not exist."""
    if not Path(file).exists():
        put(file, secrets.token_urlsafe(32))
    return Path(file).read_text().strip()


def put(file: str, secret: str, *, anew: bool = False) -> None:
    """Write a file that only this user can read; one that exists stays, unless `anew`."""
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
    """All three or none: only etcd's own start makes them, and a part fits no other part."""
    files = (AUTHORITY_FILE, ETCD_SERVER_FILE, JOIN_FILE)
    if all(Path(file).exists() for file in files):
        return
    from serving.deploy.processes import certificates  # slow to load, and rarely needed

    made = certificates.make()
    for file, text in zip(files, (made.authority, made.server, made.join), strict=True):
        put(file, text, anew=True)


def _ensure_api_certificate(host: str) -> None:
    """One for `host`; a new one when it listened elsewhere before."""
    from serving.deploy.processes import certificates  # slow to load, and rarely needed

    path = Path(API_CERTIFICATE_FILE)
    if path.exists() and certificates.names(path.read_text(), host):
        return
    made = certificates.make_for_host(host)
    put(API_AUTHORITY_FILE, made.authority, anew=True)
    put(API_CERTIFICATE_FILE, made.server, anew=True)


def with_certificate(frontend: FrontendConfig) -> FrontendConfig:
    """With the files that HTTPS needs, where it is asked for."""
    if frontend.tls_cert_file is not None:
        return replace(frontend, tls=True)
    if not frontend.tls:
        return frontend
    return replace(frontend, tls_cert_file=API_CERTIFICATE_FILE, tls_key_file=API_CERTIFICATE_FILE)


def scheme(frontend: FrontendConfig) -> str:
    return "https" if with_certificate(frontend).tls else "http"


def trust(frontend: FrontendConfig) -> ssl.SSLContext | None:
    """For this deployment's own requests over HTTPS: the very certificate it shows, under whatever
    name. None for HTTP. Raises OSError."""
    file = with_certificate(frontend).tls_cert_file
    if file is None:
        return None
    context = ssl.create_default_context(cafile=str(Path(file).expanduser()))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


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
