"""API keys in front of the application, where the configuration has some.

`/health` is open. Every other path, existing or not, needs a key.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import OperatorError
from serving.frontend.api.errors import ApiError
from serving.frontend.api.messages.errors import error_body

OPEN_PATHS = {"/health"}
_SCHEME = b"bearer "


def read_keys(path: str) -> list[str]:
    """One key per line, without empty lines and comments (`#`). Raises OperatorError."""
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise OperatorError(
            f"the API keys in {path} cannot be read: {exc}",
            remedy="correct `frontend.api_keys_file`",
        ) from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise OperatorError(f"there is no API key in {path}", remedy="write one key per line")
    return keys


class ApiKeys:
    """ASGI middleware: admits requests with one of `keys`, up to a rate for each key."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        requests_per_minute: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        # Digests have one length, so that comparing them does not reveal the length of a key.
        self._allowances = {
            _digest(key.encode()): Allowance(requests_per_minute, now) for key in keys
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await _answer(error, send, scope["path"])

    def _refusal(self, scope: Scope) -> ApiError | None:
        key = _key(scope)
        if key is None:
            return _unauthorized("There is no API key: send it as `Authorization: Bearer KEY`")
        allowance = self._find(key)
        if allowance is None:
            return _unauthorized("This service does not know the API key")
        wait_s = allowance.take() if scope["method"] == "POST" else 0.0
        if not wait_s:
            return None
        return ApiError(
            429,
            "This API key has used up its requests per minute",
            "rate_limit_error",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )

    def _find(self, key: bytes) -> Allowance | None:
        """Compares with all keys even after a match, so that the time does not reveal which."""
        digest, found = _digest(key), None
        for known, allowance in self._allowances.items():
            if hmac.compare_digest(known, digest):
                found = allowance
        return found


class Allowance:
    """A token bucket of `per_minute` requests, refilled evenly. None means no limit."""

    def __init__(self, per_minute: int | None, now: Callable[[], float]) -> None:
        self._per_minute, self._now = per_minute, now
        self._left = float(per_minute or 0)
        self._at = now()

    def take(self) -> float:
        """Take one request and return 0, or return the seconds until one is available."""
        if self._per_minute is None:
            return 0.0
        rate, now = self._per_minute / 60, self._now()
        self._left = min(float(self._per_minute), self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / rate
        self._left -= 1
        return 0.0


def _key(scope: Scope) -> bytes | None:
    """From `Authorization`, or from `x-api-key`, which Anthropic's clients send."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
            return bytes(value[len(_SCHEME) :].strip())
        if name == b"x-api-key":
            return bytes(value.strip())
    return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "invalid_request_error", code="invalid_api_key")


async def _answer(error: ApiError, send: Send, path: str) -> None:
    body = error_body(error) if path.startswith("/v1/messages") else error.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # A body that nobody reads may be on its way.
        *error.headers(),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
