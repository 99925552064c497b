"""Whether the worker behind a connection still computes: a ping each second that must be answered.

A connection stands for as long as the worker's kernel holds it, whatever has become of the worker:
stopped by a signal, stuck in its event loop, or stuck in a step of its engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PING_S = 1.0
UNANSWERED = 3
"""Pings in a row without an answer. They are counted and not timed: a frontend that was stopped
itself then reads the answers before it blames the worker."""


class Liveness:
    """Pings until it is closed. `on_wedged(reason)` is called with every ping while the worker does
    not compute, and once with an empty reason when it does again."""

    def __init__(self, ping: Callable[[], None], on_wedged: Callable[[str], None]) -> None:
        self._ping, self._on_wedged = ping, on_wedged
        self.reason = ""
        """Why the worker counts as wedged; empty while it does not."""
        self._unanswered = 0
        self._late_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(PING_S, self._tick)

    def answered(self, late_s: float) -> None:
        self._unanswered, self._late_s = 0, late_s
        if self.reason and not late_s:
            self._judge()

    def close(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(PING_S, self._tick)
        self._judge()
        self._unanswered += 1
        self._ping()

    def _judge(self) -> None:
        was_wedged = bool(self.reason)
        self.reason = self._wedged()
        if self.reason or was_wedged:
            self._on_wedged(self.reason)

    def _wedged(self) -> str:
        if self._unanswered >= UNANSWERED:
            return f"it has not answered for {self._unanswered * PING_S:.0f} s"
        if self._late_s:
            return f"its engine has been stuck in a step for {self._late_s:.0f} s longer than usual"
        return ""
