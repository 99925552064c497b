"""Deadlines for the next output of a stream, at the cost of one assignment per output.

`asyncio.timeout` around each output costs an eighth of all the work on a token: it makes a timer,
looks up the task and tells its own cancellation from others. Here one timer per stream checks from
time to time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class StreamDeadline:
    """A context manager around reading a stream. Calls `on_expired` once when `due` has passed.

    `due` is when the next output must be there, in loop time. It is None while nobody waits,
    because a caller may pause between two outputs. Set it at least `shortest_s` ahead, or to
    `end`. The whole stream must be over by `end`, which may move to a later time.
    """

    __slots__ = ("_loop", "_on_expired", "_shortest_s", "_timer", "due", "end")

    def __init__(
        self,
        shortest_s: float,
        end: float,
        on_expired: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self._shortest_s, self._on_expired = shortest_s, on_expired
        self.end = end
        self.due: float | None = None

    def __enter__(self) -> Self:
        self._rearm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()

    def _rearm(self) -> None:
        """Check again as late as possible without missing any `due`."""
        now = self._loop.time()
        latest = now + self._shortest_s
        if self.due is not None:
            latest = min(latest, self.due)
        # `end` passes unnoticed only while nobody waits. The next wait then expires within moments.
        soonest = now + min(0.05, self._shortest_s)
        self._timer = self._loop.call_at(max(min(latest, self.end), soonest), self._check)

    def _check(self) -> None:
        if self.due is not None and self._loop.time() >= self.due:
            self._on_expired()
        else:
            self._rearm()
