"""A circuit breaker: whether requests may go to an instance that failed.

Closed: requests go there. Open: none do, for twice as long after each failure in a row. Half-open,
once that time is over: one request probes the instance. Its first output closes the breaker, its
failure opens it again. A busy instance has not failed. One that answers with errors has failed
after several in a row, since a single error may be the request's fault.
"""

from __future__ import annotations

from random import Random
from typing import Literal

State = Literal["closed", "open", "half_open"]

FIRST_S, LONGEST_S = 2.0, 60.0
JITTER = 0.2
"""Share by which a pause varies, so that frontends do not all probe at the same moment."""
ERRORS = 3


class Breaker:
    """The breaker of one instance in one frontend. Times are seconds of one clock."""

    __slots__ = ("_errors", "_failures", "_is_probed", "_open_until_s", "_rng", "openings")

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._failures = self._errors = 0
        self._open_until_s = 0.0
        self._is_probed = False
        self.openings = 0

    def state(self, now_s: float) -> State:
        if not self._failures:
            return "closed"
        return "open" if now_s < self._open_until_s else "half_open"

    def admits(self, now_s: float) -> bool:
        """Whether a request may go there now."""
        return not self._failures or (now_s >= self._open_until_s and not self._is_probed)

    def request_sent(self) -> bool:
        """A request goes there. Returns whether it is the probe of a half-open breaker."""
        is_probe = bool(self._failures) and not self._is_probed
        self._is_probed = self._is_probed or is_probe
        return is_probe

    def probe_ended(self) -> None:
        """The probe has ended, perhaps without a verdict: the next request may probe."""
        self._is_probed = False

    def succeeded(self) -> None:
        """It gave a first output."""
        self._failures = 0
        self._is_probed = False

    def finished(self) -> None:
        """It brought a request to its end."""
        self._errors = 0

    def failed(self, now_s: float) -> None:
        """Its connection broke, or it was silent past a deadline."""
        pause_s = min(LONGEST_S, FIRST_S * 2**self._failures)
        self._failures += 1
        self._open_until_s = now_s + pause_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
        self._is_probed = False
        self.openings += 1

    def answered_error(self, now_s: float) -> None:
        """It ended a request with an error of its own."""
        self._errors += 1
        if self._errors >= ERRORS or self._failures:
            self.failed(now_s)
