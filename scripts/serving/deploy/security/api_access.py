"""How this deployment's own commands reach its API: HTTP or HTTPS, and with which key."""

from __future__ import annotations

import ssl
from pathlib import Path

from msgspec.structs import replace

from serving.config import FrontendConfig, is_loopback
from serving.deploy.security.secret_files import API_CERTIFICATE_FILE, API_KEYS_FILE


def with_certificate_files(frontend: FrontendConfig) -> FrontendConfig:
    """`frontend` with the certificate files that HTTPS needs, if it uses HTTPS."""
    if frontend.tls_cert_file is not None:
        return replace(frontend, tls=True)
    if not frontend.tls:
        return frontend
    return replace(frontend, tls_cert_file=API_CERTIFICATE_FILE, tls_key_file=API_CERTIFICATE_FILE)


def url_scheme(frontend: FrontendConfig) -> str:
    """`http` or `https`."""
    return "https" if with_certificate_files(frontend).tls else "http"


def client_tls(frontend: FrontendConfig) -> ssl.SSLContext | None:
    """TLS for this deployment's own requests: it accepts only the API's own certificate.

    The name in the certificate does not matter. None for HTTP. Raises OSError.
    """
    file = with_certificate_files(frontend).tls_cert_file
    if file is None:
        return None
    context = ssl.create_default_context(cafile=str(Path(file).expanduser()))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def api_keys_file(frontend: FrontendConfig) -> str | None:
    """The file with the API's keys. Off loopback there are always keys."""
    if frontend.api_keys_file is None and not is_loopback(frontend.host):
        return API_KEYS_FILE
    return frontend.api_keys_file


def authorization_headers(frontend: FrontendConfig) -> dict[str, str]:
    """The headers for this deployment's own requests to its API.

    Empty when the API needs no key, or when no keys exist yet.
    """
    if (file := api_keys_file(frontend)) is None:
        return {}
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text().splitlines()]
    except OSError:
        return {}
    key = next((line for line in lines if line and not line.startswith("#")), "")
    return {"authorization": f"Bearer {key}"} if key else {}
