"""Virtual time: what is due happens in order, and nothing takes time by itself."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """Seconds since the start. Calling it tells the time, as `KvRouter` wants its clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def __call__(self) -> float:
        return self.now_s

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        """Do this then, after what was asked for the same time before."""
        self._number += 1
        heapq.heappush(self._due, (max(time_s, self.now_s), self._number, do))

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, do)

    def run(self, until_s: float = float("inf")) -> None:
        """Until nothing is due, or that time has come."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, do = heapq.heappop(self._due)
            do()
        if until_s != float("inf"):
            self.now_s = max(self.now_s, until_s)
