"""Whether an instance that failed is trusted again: a circuit breaker.

Closed: requests go there. Open: none do, for twice as long after each failure in a row. Half-open,
once that time is over: one request tries, and its first output closes the breaker, its failure
opens it again. An instance that is busy has not failed; one that answers errors has after some of
them in a row, since an error may be the request's fault.
"""

from __future__ import annotations

from random import Random
from typing import Literal

State = Literal["closed", "open", "half_open"]

FIRST_S, LONGEST_S = 2.0, 60.0
JITTER = 0.2
"""Share by which a pause differs, so that frontends do not all try at the same moment."""
ERRORS = 3


class Breaker:
    """Of one instance, in one frontend. Times are seconds of any one clock."""

    __slots__ = ("_errors", "_failures", "_is_tried", "_open_until_s", "_rng", "openings")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._failures = self._errors = 0
        self._open_until_s = 0.0
        self._is_tried = False
        self.openings = 0

    def state(self, now_s: float) -> State:
        if not self._failures:
            return "closed"
        return "open" if now_s < self._open_until_s else "half_open"

    def admits(self, now_s: float) -> bool:
        """Whether a request may go there now."""
        return not self._failures or (now_s >= self._open_until_s and not self._is_tried)

    def sent(self) -> bool:
        """A request goes there; whether it is the one that tries."""
        tries = bool(self._failures) and not self._is_tried
        self._is_tried = self._is_tried or tries
        return tries

    def try_over(self) -> None:
        """The request that tried has ended, perhaps without a verdict: another one may."""
        self._is_tried = False

    def succeeded(self) -> None:
        """It gave a first output."""
        self._failures = 0
        self._is_tried = False

    def finished(self) -> None:
        """It brought a request to its end."""
        self._errors = 0

    def failed(self, now_s: float) -> None:
        """It is gone, or said nothing for too long."""
        pause_s = min(LONGEST_S, FIRST_S * 2**self._failures)
        self._failures += 1
        self._open_until_s = now_s + pause_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
        self._is_tried = False
        self.openings += 1

    def answered_error(self, now_s: float) -> None:
        self._errors += 1
        if self._errors >= ERRORS or self._failures:
            self.failed(now_s)
