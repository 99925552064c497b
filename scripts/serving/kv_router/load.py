"""How loaded each instance is: what it reported, and what was sent there since.

Reports arrive once per engine step and cover the work of every frontend, but they are always a
little old. Requests that were sent meanwhile are added: our own, and those of peer routers
(`RoutingDecision`). A request counts as unseen until a report arrives that was made at least
`REPORT_LAG_S` after the request was sent; until then it may have been on the wire. Meanwhile it
may be counted twice, but it is never missed.

A report older than `REPORT_MAX_AGE_S` is ignored. Workers report at least once a second, so NATS
must be down, and a frozen number would attract or repel requests for as long as that lasts. Then
only requests in flight count.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from serving.load_report import LoadReport

REPORT_MAX_AGE_S = 3.0
REPORT_LAG_S = 0.1
"""A burst of long prompts keeps a frontend and a worker busy for some 50 ms: a report that was made
before a request arrived is then read this long after the request was sent."""


class Load(NamedTuple):
    """Prompt tokens waiting or partly computed, blocks held by requests, and requests."""

    queued_tokens: int = 0
    active_blocks: int = 0
    num_requests: int = 0


class Reservation:
    """One request's share of an instance's load, from its routing to its end."""

    __slots__ = ("_blocks", "_held", "_load", "_queued_tokens", "is_unseen", "sent_at_s")

    def __init__(self, load: InstanceLoad, queued_tokens: int, blocks: int, now_s: float) -> None:
        self._load = load
        self.sent_at_s = now_s
        self.is_unseen = self._held = True
        self._queued_tokens, self._blocks = 0, 0
        self._add(queued_tokens, blocks, 1)

    def prefilled(self) -> None:
        """The first output arrived: the prompt no longer waits. Later calls change nothing."""
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

    def share(self) -> Load:
        """The load that it counts for now."""
        return Load(self._queued_tokens, self._blocks, int(self._held))

    def _add(self, queued_tokens: int, blocks: int, requests: int) -> None:
        self._queued_tokens += queued_tokens
        self._blocks += blocks
        load, change = self._load, Load(queued_tokens, blocks, requests)
        load.in_flight = _sum(load.in_flight, change)
        # Once a report contains the request, later reports show its changes.
        if self.is_unseen:
            load.unseen = _sum(load.unseen, change)


class InstanceLoad:
    """The load of one registration of an instance. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.in_flight = Load()
        """All of our own requests."""
        self.of_peers = Load()
        """Requests of peer routers that the last report may not contain."""
        self.unseen = Load()
        """Everything that the last report may not contain: those, and some of our own requests."""
        self.last_report: LoadReport | None = None
        self._reported, self._good_until_s = Load(), float("-inf")
        self._seen_s = float("-inf")
        self._own: deque[Reservation] = deque()  # the unseen ones, oldest first
        self._of_peers: deque[tuple[float, Load]] = deque()

    def reserve(self, *, queued_tokens: int, blocks: int, now_s: float) -> Reservation:
        """Count a request that is about to be sent; the caller releases it."""
        self._seen_until(now_s - REPORT_MAX_AGE_S)
        reservation = Reservation(self, queued_tokens, blocks, now_s)
        self._own.append(reservation)
        return reservation

    def add_peer_request(self, load: Load, sent_s: float, now_s: float) -> None:
        """A peer router sent a request there a moment ago."""
        self._seen_until(now_s - REPORT_MAX_AGE_S)
        if sent_s <= self._seen_s:
            return  # the last report contains it
        self._of_peers.append((sent_s, load))
        self.of_peers = _sum(self.of_peers, load)
        self.unseen = _sum(self.unseen, load)

    def report(self, report: LoadReport, now_s: float) -> None:
        """Take over what the worker reports."""
        self.last_report, self._good_until_s = report, now_s + REPORT_MAX_AGE_S
        self._reported = Load(
            report.queued_tokens, report.active_blocks, report.num_running + report.num_waiting
        )
        self._seen_until(now_s - REPORT_LAG_S)

    @property
    def num_waiting(self) -> int:
        """Requests that the worker had no room for, when it reported last."""
        return self.last_report.num_waiting if self.last_report else 0

    def estimate(self, now_s: float) -> Load:
        """The best guess of the load right now."""
        if now_s > self._good_until_s:
            self._seen_until(now_s - REPORT_MAX_AGE_S)
            return _sum(self.in_flight, self.of_peers)
        if not self._own and not self._of_peers:
            return self._reported
        return _sum(self._reported, self.unseen)

    def _seen_until(self, time_s: float) -> None:
        """Stop adding requests that were sent until then: the last report contains them, or is too
        old to tell."""
        self._seen_s = max(self._seen_s, time_s)
        while self._own and self._own[0].sent_at_s <= time_s:
            reservation = self._own.popleft()
            reservation.is_unseen = False
            self.unseen = _less(self.unseen, reservation.share())
        while self._of_peers and self._of_peers[0][0] <= time_s:
            load = self._of_peers.popleft()[1]
            self.of_peers = _less(self.of_peers, load)
            self.unseen = _less(self.unseen, load)


def _sum(first: Load, other: Load) -> Load:
    return Load(first[0] + other[0], first[1] + other[1], first[2] + other[2])


def _less(first: Load, other: Load) -> Load:
    return Load(first[0] - other[0], first[1] - other[1], first[2] - other[2])
