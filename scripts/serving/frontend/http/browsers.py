"""What pages in a browser may do with the API.

Any page of the web can send requests to an API on loopback: by its address, with a body that needs
no permission, or by a host name of its own that it resolves to loopback. Without API keys, nothing
else keeps it out. So requests with a foreign `Origin` are refused, and on loopback those with a
foreign `Host`. Pages from loopback, and from `frontend.cors_origins`, get CORS's permission.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.frontend.api.errors import ApiError
from serving.frontend.http.replies import send_error

LOOPBACK_ORIGIN = r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"


def with_browser_rules(
    app: ASGIApp, *, origins: Sequence[str], allowed_hosts: Sequence[str] | None
) -> ASGIApp:
    """`app` behind these rules. `origins` may hold `*`. `allowed_hosts` None: any `Host` will do."""
    guarded = BrowserGuard(app, origins=origins, allowed_hosts=allowed_hosts)
    for_pages = CORSMiddleware(
        guarded,
        allow_origins=list(origins),
        allow_origin_regex=LOOPBACK_ORIGIN,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "x-ignored"],
    )

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        """Only browsers send `Origin`; other clients need not pay for CORS."""
        from_page = scope["type"] == "http" and any(n == b"origin" for n, _ in scope["headers"])
        await (for_pages if from_page else guarded)(scope, receive, send)

    return route


class BrowserGuard:
    """Refuses requests that a foreign page sends (HTTP 403)."""

    def __init__(
        self, app: ASGIApp, *, origins: Sequence[str], allowed_hosts: Sequence[str] | None
    ) -> None:
        self._app = app
        self._any_origin, self._origins = "*" in origins, frozenset(origins)
        self._loopback = re.compile(LOOPBACK_ORIGIN)
        self._hosts = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)) is not None:
            await send_error(send, error, ((b"connection", b"close"),))
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        host = origin = ""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
        if origin and not (
            self._any_origin or origin in self._origins or self._loopback.fullmatch(origin)
        ):
            return _forbidden(f"Pages of {origin[:100]} may not call this API", "cors_origins")
        if self._hosts is not None and host and not self._is_allowed(host):
            return _forbidden(f"The host {host[:100]} is not this service's", "allowed_hosts")
        return None

    def _is_allowed(self, host: str) -> bool:
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name == "localhost" or (self._hosts is not None and name in self._hosts):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _forbidden(what: str, key: str) -> ApiError:
    message = f"{what}; `frontend.{key}` allows more"
    return ApiError(403, message, "invalid_request_error", code="forbidden")
