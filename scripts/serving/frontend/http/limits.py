"""Limits on what a client may use: the time to send a request, requests in flight.

Also here: noticing that a client has left.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from starlette.types import Receive

from serving.errors import InvalidRequest, Overloaded
from serving.frontend.metrics.collectors import Gauge

BODY_TIMEOUT_S = 60.0
"""Time a client gets to send its request."""
RATE_WINDOW_S = 10.0
"""Time constant of the rate at which samples end: an older end counts 1/e as much."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
MIN_RECENT = 0.01
"""With fewer recent ends than this, there is no rate to speak of."""


class TooManyInFlight(Overloaded):
    """This frontend already generates `frontend.max_inflight` samples (HTTP 429)."""


class BodyTimeout(InvalidRequest):
    """The client did not send its body in time (HTTP 408)."""


class ClientGone(Exception):
    """The client has closed its connection. There is nobody to answer."""


class InFlight:
    """Counts the samples being generated and refuses new ones beyond `limit`.

    `retry_after_s` estimates when there is room, from the rate at which samples have ended lately.
    """

    def __init__(self, limit: int, gauge: Gauge, now: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._gauge, self._now = limit, gauge, now
        self.count = 0
        # Samples that ended, each with a weight that decays with time.
        self._recent, self._recent_at = 0.0, now()

    @contextmanager
    def hold(self, num_samples: int) -> Iterator[None]:
        """Count `num_samples` until exit. Raises TooManyInFlight."""
        self.check_room(num_samples)
        self._add(num_samples)
        try:
            yield
        finally:
            self._add(-num_samples)
        self._recent = self._recently_ended() + num_samples  # failed ones do not count

    def check_room(self, num_samples: int) -> None:
        """Raises TooManyInFlight when these samples could not begin now."""
        if not self.has_room(num_samples):
            raise TooManyInFlight(
                f"{self._limit} requests are in flight already", retry_after_s=self.retry_after_s()
            )

    def has_room(self, num_samples: int) -> bool:
        """Whether these samples could begin now."""
        return self.count + num_samples <= self._limit

    def retry_after_s(self) -> float:
        """Seconds until one more sample probably fits."""
        recent = self._recently_ended()
        if recent < MIN_RECENT:
            return MIN_RETRY_S
        return min(MAX_RETRY_S, max(MIN_RETRY_S, RATE_WINDOW_S / recent))

    def _recently_ended(self) -> float:
        now = self._now()
        self._recent *= math.exp((self._recent_at - now) / RATE_WINDOW_S)
        self._recent_at = now
        return self._recent

    def check_possible(self, num_samples: int) -> None:
        """Raises InvalidRequest for more samples than even an idle frontend takes."""
        if num_samples > self._limit:
            raise InvalidRequest(
                f"The request is for {num_samples} completions, but at most {self._limit} may run "
                "at once",
                param="n",
            )

    def _add(self, num_samples: int) -> None:
        self.count += num_samples
        self._gauge.value = self.count


class ArrivingBodies:
    """Counts the bytes of bodies that are not complete yet, and refuses more than `limit`.

    A body takes no place of a request before all of it is there, so slow ones keep nobody out. This
    is what bounds the memory that they take instead.
    """

    def __init__(self, limit: int = 256 * 1024 * 1024) -> None:
        self._limit = limit
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises Overloaded. Without that, the caller must take them off again."""
        if num_bytes > 0 and self.num_bytes + num_bytes > self._limit:
            raise Overloaded(f"{self._limit} bytes of other requests are arriving already")
        self.num_bytes += num_bytes


class cancelled_on_disconnect:
    """Cancels the enclosed work when the client closes its connection, and raises ClientGone.

    Enter it after the body is read: then the server has only a disconnect to report. Leave it
    before the last byte is sent: servers report a complete response as a disconnect, too.
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
        del self._watcher  # Its traceback refers to `self`: a cycle for the garbage collector.
        if kind is asyncio.CancelledError and self._gone and self._worker.uncancel() == 0:
            # Not if something else has cancelled too (shutdown): that must continue.
            raise ClientGone from None
