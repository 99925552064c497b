"""How long a step may take, by what steps have taken so far, and by how much one is late.

The limit follows from measurements, since a step takes a millisecond on one machine and a minute on
another one. It is generous: a step that is late takes ten times as long as the slowest one of its
size so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_S = 120.0
"""Before any step has been measured: the first one may compile kernels."""
LEAST_S = 5.0
"""Room for a pause of the machine, however fast the steps are."""
FACTOR = 10.0


class StepClock:
    """One thread begins and ends steps, in their order; any thread may ask.

    Several steps may be under way. The oldest one counts from the end of the one before it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: list[int] = []  # tokens
        self._since = 0.0
        self._slowest_s = 0.0
        self._most_tokens = 0

    def begin(self, num_tokens: int) -> None:
        if not self._under_way:
            self._since = self._clock()
        self._under_way.append(num_tokens)

    def cancel(self) -> None:
        """The newest step did not get under way."""
        if self._under_way:
            self._under_way.pop()

    def end(self) -> None:
        """The oldest step is over."""
        if not self._under_way:
            return
        now = self._clock()
        num_tokens = self._under_way.pop(0)
        self._slowest_s = max(self._slowest_s, now - self._since)
        self._most_tokens = max(self._most_tokens, num_tokens)
        self._since = now

    def late_s(self) -> float:
        """Seconds by which the oldest step is late."""
        under_way, since = list(self._under_way), self._since
        if not under_way:
            return 0.0
        return max(0.0, self._clock() - since - self._limit_s(under_way[0]))

    def _limit_s(self, num_tokens: int) -> float:
        if not self._most_tokens:
            return FIRST_S
        larger = max(1.0, num_tokens / self._most_tokens)
        return LEAST_S + FACTOR * self._slowest_s * larger
