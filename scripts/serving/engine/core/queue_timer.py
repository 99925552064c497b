"""When requests have waited for too long in the queue of an engine.

One timer for all of them: hardly any request waits so long, and a timer of its own would cost each
one, and keep its tokens in memory after it has ended. It runs on the event loop, so that it goes
off while a step takes its time, or takes for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.engine.core.sequence import Sequence


class QueueTimer:
    """Calls `expire` with the loop's time when somebody's time in the queue is over.

    `expire` returns when that is so for the next one, None where nobody waits.
    """

    def __init__(self, expire: Callable[[float], float | None]) -> None:
        self._expire = expire
        self._handle: asyncio.TimerHandle | None = None

    def watch(self, sequence: Sequence) -> None:
        """It is about to be queued; its time begins."""
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
            self._handle = asyncio.get_running_loop().call_at(due, self._go_off)

    def _go_off(self) -> None:
        self._handle = None
        due = self._expire(asyncio.get_running_loop().time())
        if due is not None:
            self._arm(due)
