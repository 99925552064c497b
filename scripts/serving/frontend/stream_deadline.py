"""Deadlines for the next output of a stream, at the price of an assignment for each output.

A timeout of asyncio's per output makes a timer, looks up its task and tells its cancellation from
others: an eighth of what a token costs. Here one timer per stream looks now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class StreamDeadline:
    """A context manager around reading a stream; calls `give_up` once when `until` has passed.

    `until` is loop time, and None while nobody waits: a caller may take its time between two
    outputs. It is set at least `shortest_s` ahead, or to `at_last`, when all of it ends; that
    may be put off.
    """

    __slots__ = ("_give_up", "_loop", "_shortest_s", "_timer", "at_last", "until")

    def __init__(self, shortest_s: float, at_last: float, give_up: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._shortest_s, self._give_up = shortest_s, give_up
        self.at_last = at_last
        self.until: float | None = None

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
        """As late as no `until` can be missed."""
        now = self._loop.time()
        latest = now + self._shortest_s
        if self.until is not None:
            latest = min(latest, self.until)
        # Past the end only while nobody waits: whoever does next is then told within moments.
        soonest = now + min(0.05, self._shortest_s)
        self._timer = self._loop.call_at(max(min(latest, self.at_last), soonest), self._look)

    def _look(self) -> None:
        if self.until is not None and self._loop.time() >= self.until:
            self._give_up()
        else:
            self._rearm()
