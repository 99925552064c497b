"""Ends requests that waited for too long in the queue of an engine.

One timer serves all requests: hardly any request waits so long, and a timer for each would cost
time and keep the request's tokens in memory after its end. It runs on the event loop, so that it
fires even while a step takes long, or never ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.engine.core.sequence import Sequence


class QueueTimer:
    """Calls `expire` with the loop's time when the time of a queued request is over.

    `expire` returns the loop time of the next expiry, None where no request can expire.
    """

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        self._expire = expire
        self._handle: asyncio.TimerHandle | None = None

    def watch(self, sequence: Sequence) -> None:
        """A request is about to be queued: its time begins."""
        if sequence.request.queue_s is not None:
            sequence.queued_until = asyncio.get_running_loop().time() + sequence.request.queue_s
            self._arm(sequence.queued_until)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self, due: float) -> None:
        if self._handle is None or due < self._handle.when():
            self.cancel()
            self._handle = asyncio.get_running_loop().call_at(due, self._fire)

    def _fire(self) -> None:
        self._handle = None
        due = self._expire(asyncio.get_running_loop().time())
        if due is not None:
            self._arm(due)
