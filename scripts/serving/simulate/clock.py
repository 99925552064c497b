"""Virtual time: callbacks run in the order of their times, and computing takes no time."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """Seconds since the start. Calling it returns the time, which `KvRouter` expects of a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def __call__(self) -> float:
        return self.now_s

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        """Run `do` at that time, after everything that was scheduled for it before."""
        self._number += 1
        heapq.heappush(self._due, (max(time_s, self.now_s), self._number, do))

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        """Run `do` after that delay."""
        self.at(self.now_s + delay_s, do)

    def run(self, until_s: float = float("inf")) -> None:
        """Run until nothing is scheduled, or until `until_s`."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, do = heapq.heappop(self._due)
            do()
        if until_s != float("inf"):
            self.now_s = max(self.now_s, until_s)
