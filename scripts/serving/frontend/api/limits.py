"""What a client may take: bytes of body, requests in flight, time. And noticing that it left."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from starlette.types import Receive, Scope

from serving.errors import InvalidRequest, Overloaded, RequestTooLarge
from serving.frontend.metrics.collectors import Gauge

BODY_TIMEOUT_S = 60.0
"""Time a client gets to send its request."""


MEMORY_S = 10.0
"""How far back the rate counts at which sequences end: an e-th after this time."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
FORGOTTEN = 0.01


class TooManyInFlight(Overloaded):
    """This frontend has `frontend.max_inflight` sequences already (HTTP 429)."""


class BodyTimeout(InvalidRequest):
    """The client did not send its body in time (HTTP 408)."""


class ClientGone(Exception):
    """The client closed its connection: nobody is left to answer."""


class InFlight:
    """Counts sequences being generated, and refuses more than `limit`: the newest, so that what was
    begun is finished."""

    def __init__(self, limit: int, gauge: Gauge, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._gauge, self._now = limit, gauge, now
        self.count = 0
        # Sequences that ended, each counting for less the longer ago that was.
        self._ended, self._ended_at = 0.0, now()

    @contextmanager
    def hold(self, num_sequences: int) -> Iterator[None]:
        """Take places until exit. Raises TooManyInFlight."""
        if self.count + num_sequences > self._limit:
            raise TooManyInFlight(
                f"{self._limit} requests are in flight already", retry_after_s=self.place_s()
            )
        self._add(num_sequences)
        try:
            yield
        finally:
            self._add(-num_sequences)
        self._ended = self._recently_ended() + num_sequences  # not those that failed

    def place_s(self) -> float:
        """Seconds until a place is free, at the rate at which sequences have lately ended."""
        ended = self._recently_ended()
        if ended < FORGOTTEN:
            return MIN_RETRY_S  # nothing is known
        return min(MAX_RETRY_S, max(MIN_RETRY_S, MEMORY_S / ended))

    def _recently_ended(self) -> float:
        now = self._now()
        self._ended *= math.exp((self._ended_at - now) / MEMORY_S)
        self._ended_at = now
        return self._ended

    def check_possible(self, num_sequences: int) -> None:
        """Raises InvalidRequest for what would not fit even into an idle frontend."""
        if num_sequences > self._limit:
            raise InvalidRequest(
                f"{num_sequences} completions were asked for; {self._limit} may run at once",
                param="n",
            )

    def _add(self, num_sequences: int) -> None:
        self.count += num_sequences
        self._gauge.value = self.count


async def read_body(
    scope: Scope, receive: Receive, max_bytes: int, *, timeout_s: float = BODY_TIMEOUT_S
) -> bytes:
    """The whole body. Raises RequestTooLarge without keeping more than `max_bytes`.

    The announced length is checked before anything is read, and the actual one while reading.
    Raises BodyTimeout, ClientGone.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
            raise RequestTooLarge(_too_large(max_bytes), code="request_too_large")
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise RequestTooLarge(_too_large(max_bytes), code="request_too_large")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise BodyTimeout(f"The request body did not arrive within {timeout_s:g} s") from None


def _too_large(max_bytes: int) -> str:
    return f"The request body is larger than {max_bytes} bytes"


class cancelled_on_disconnect:
    """Cancel the enclosed work when the client closes its connection, and raise ClientGone.

    Enter it after the body was read, when the server has nothing but the disconnect to report,
    and leave it before the last byte is sent: a complete response reads as a disconnect, too.
    """

    __slots__ = ("_gone", "_receive", "_watcher", "_worker")

    def __init__(self, receive: Receive) -> None:
        self._receive, self._gone = receive, False

    async def __aenter__(self) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        self._worker = worker
        self._watcher = asyncio.create_task(self._watch(), name="watch-disconnect")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._worker.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watcher.cancel()
        del self._watcher  # Its traceback refers to us: that would be garbage for the collector.
        if kind is asyncio.CancelledError and self._gone and self._worker.uncancel() == 0:
            # Unless someone else has cancelled as well (shutdown): that must go on.
            raise ClientGone from None
