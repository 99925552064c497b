"""How loaded each instance is: what it reported, and what this frontend sent since.

Reports arrive once per engine step and cover the work of every frontend, but they are always a
little old; our own requests are known at once, but only ours. Both are joined by one rule, for
each of the three figures:

    max(reported + sent since that report arrived, everything of ours still in flight)

The first term trusts the report for what it can have seen, so nothing is counted twice. The
second covers requests that were on the wire while the report was written. A report older than
`REPORT_MAX_AGE_S` is ignored: workers report at least once a second, so the event plane is down
and a frozen number would attract or repel requests for as long as it lasts.
"""

from __future__ import annotations

from typing import NamedTuple

from serving.protocol import LoadReport

REPORT_MAX_AGE_S = 3.0


class Load(NamedTuple):
    """Prompt tokens waiting or partly computed, blocks held by requests, and requests."""

    queued_tokens: int = 0
    active_blocks: int = 0
    num_requests: int = 0


class Reservation:
    """One request's share of an instance's load, from its routing to its end."""

    __slots__ = ("_blocks", "_held", "_load", "_queued_tokens", "_report_number")

    def __init__(self, load: InstanceLoad, queued_tokens: int, blocks: int) -> None:
        self._load = load
        self._report_number = load.report_number
        self._queued_tokens, self._blocks = 0, 0
        self._held = True
        self._add(queued_tokens, blocks, 1)

    def prefilled(self) -> None:
        """The first output is here: the prompt waits no longer. Later calls change nothing."""
        if self._queued_tokens:
            self._add(-self._queued_tokens, 0, 0)

    def grow(self, blocks: int) -> None:
        """The request now holds `blocks` more."""
        if self._held:
            self._add(0, blocks, 0)

    def release(self) -> None:
        """The request is over. Later calls change nothing."""
        if self._held:
            self._held = False
            self._add(-self._queued_tokens, -self._blocks, -1)

    def _add(self, queued_tokens: int, blocks: int, requests: int) -> None:
        self._queued_tokens += queued_tokens
        self._blocks += blocks
        load = self._load
        load.in_flight = _sum(load.in_flight, queued_tokens, blocks, requests)
        # Growth of a request that an earlier report has seen is left to the next report.
        if self._report_number == load.report_number:
            load.since_report = _sum(load.since_report, queued_tokens, blocks, requests)


class InstanceLoad:
    """The load of one registration of an instance. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.in_flight = Load()
        self.since_report = Load()
        self.report_number = 0
        self.last_report: LoadReport | None = None
        self._reported_at_s = 0.0

    def reserve(self, *, queued_tokens: int, blocks: int) -> Reservation:
        """Count a request that is about to be sent; the caller releases it."""
        return Reservation(self, queued_tokens, blocks)

    def report(self, report: LoadReport, now_s: float) -> None:
        """Take over what the worker says about itself."""
        self.last_report, self._reported_at_s = report, now_s
        self.since_report = Load()
        self.report_number += 1

    def estimate(self, now_s: float) -> Load:
        """The best guess of the load right now."""
        report, own = self.last_report, self.in_flight
        if report is None or now_s - self._reported_at_s > REPORT_MAX_AGE_S:
            return own
        since = self.since_report
        return Load(
            max(report.queued_tokens + since.queued_tokens, own.queued_tokens),
            max(report.active_blocks + since.active_blocks, own.active_blocks),
            max(report.num_running + report.num_waiting + since.num_requests, own.num_requests),
        )


def _sum(load: Load, queued_tokens: int, blocks: int, requests: int) -> Load:
    return Load(load[0] + queued_tokens, load[1] + blocks, load[2] + requests)
