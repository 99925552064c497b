"""HTTP as uvicorn reads it, with limits on a request's head and plain bodies for HTTP/1.0.

There are fewer connections than descriptors, or nobody could connect any more, not even to `/health`.
When all are taken, a new one takes the place of one that waits for nothing.

Neither uvicorn nor httptools limits the size of a head or the time that it takes to arrive, and a
response without a length is sent in chunks, which HTTP/1.0 does not know.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from itertools import islice
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 15.0
"""Time for a head to arrive, from when the connection is made or its first byte has come."""

KEPT_DESCRIPTORS = 256
"""For workers, files and libraries; at most half of all."""
LOOKED_AT = 64
"""Of the idle connections, the oldest among so many goes: a flood must not cost a look at all."""
LOG_EVERY_S = 10.0

log = logging.getLogger(__name__)

_FULL = b"503 Service Unavailable"
_TOO_LARGE = b"431 Request Header Fields Too Large"
_TOO_SLOW = b"408 Request Timeout"


def connection_limit() -> int:
    """How many connections this process's limit on open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = 1 << 20
    return files - min(files // 2, KEPT_DESCRIPTORS)


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. A head that is too large gets 431; a head that is too slow, 408. A connection
    beyond `max_connections` (0: `connection_limit`) ends an idle one, or gets 503."""

    max_connections = 0
    _logged: ClassVar[dict[str, float]] = {}
    max_head_bytes = MAX_HEAD_BYTES
    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head, self._head_bytes = True, 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()
        limit = self.max_connections or connection_limit()
        if len(self.connections) > limit:
            self._make_room(limit)

    @property
    def is_idle(self) -> bool:
        """No request is being answered, and it is not closing."""
        is_over = self.cycle is None or self.cycle.response_complete
        return is_over and not self.transport.is_closing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()

    def _make_room(self, limit: int) -> None:
        """Silence is no reason to keep a newcomer out."""
        others = (cast(LimitedHttpProtocol, each) for each in self.connections if each is not self)
        idle = islice((each for each in others if each.is_idle), LOOKED_AT)
        oldest = min(idle, key=lambda each: each._idle_since, default=None)
        now = self.loop.time()
        if now - self._logged.get("full", -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged["full"] = now
            log.warning(
                "%d connections are open, as many as the limit on open files allows "
                "(`ulimit -n`): idle ones are ended, and others get 503",
                limit,
            )
        if oldest is None:
            self._refuse(_FULL)
        else:
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self._refuse(_TOO_LARGE)
        elif self._head_timer is None:
            self._start_head_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # The task that runs it begins later. Both classes have the same layout.
            self.cycle.__class__ = UntilCloseCycle

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(_TOO_SLOW)
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: bytes) -> None:
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        head = b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        self.transport.write(head)
        self.transport.close()


class UntilCloseCycle(RequestResponseCycle):
    """A response whose length is not known ends with the connection."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                self.chunked_encoding, self.expected_content_length = False, 2**62
        elif self.expected_content_length > 2**61 and not message.get("more_body", False):
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
