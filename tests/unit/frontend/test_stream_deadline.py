"""Deadlines that cost no timer per output, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from serving.frontend.stream_deadline import StreamDeadline


class VirtualLoop:
    """The part of an event loop that keeps time. `advance` runs the timers that are due."""

    def __init__(self) -> None:
        self._now = 100.0
        self._timers: list[VirtualTimer] = []
        self.num_timers_run = 0

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        timer = VirtualTimer(when, callback, self._timers)
        self._timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        end = self._now + seconds
        while due := [timer for timer in self._timers if timer.when <= end]:
            timer = min(due, key=lambda timer: timer.when)
            timer.cancel()
            self._now = max(self._now, timer.when)
            self.num_timers_run += 1
            timer.callback()
        self._now = end

    @property
    def is_idle(self) -> bool:
        return not self._timers


class VirtualTimer:
    def __init__(
        self, when: float, callback: Callable[[], None], timers: list[VirtualTimer]
    ) -> None:
        self.when, self.callback, self._timers = when, callback, timers

    def cancel(self) -> None:
        if self in self._timers:
            self._timers.remove(self)


@pytest.fixture
def loop() -> VirtualLoop:
    return VirtualLoop()


class Expiries:
    """When the deadline expired, in the loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(self._loop.time())


def make_deadline(
    loop: Any, on_expired: Callable[[], None], shortest_s: float, end: float
) -> StreamDeadline:
    return StreamDeadline(shortest_s, end, on_expired, loop)


def test_deadline_expires_once_when_no_output_comes(loop: VirtualLoop) -> None:
    expiries = Expiries(loop)
    with make_deadline(loop, expiries, 0.1, loop.time() + 60) as deadline:
        due = deadline.due = loop.time() + 0.1
        loop.advance(10)
    assert expiries.at == [due]


def test_outputs_in_time_and_pauses_of_the_caller_do_not_expire(loop: VirtualLoop) -> None:
    expiries = Expiries(loop)
    with make_deadline(loop, expiries, 0.1, loop.time() + 60) as deadline:
        for _ in range(5):
            deadline.due = loop.time() + 0.1
            loop.advance(0.05)
        deadline.due = None
        loop.advance(0.3)
        assert not expiries.at
        due = deadline.due = loop.time() + 0.1
        loop.advance(0.3)
    [expired_at] = expiries.at
    assert due <= expired_at < due + 0.05


def test_end_of_the_stream_expires_before_the_next_output_is_due(loop: VirtualLoop) -> None:
    expiries = Expiries(loop)
    end = loop.time() + 0.1
    with make_deadline(loop, expiries, 10.0, end) as deadline:
        deadline.due = end
        loop.advance(1)
    assert expiries.at == [end]


def test_end_that_moves_to_later_does_not_expire_and_costs_one_check(loop: VirtualLoop) -> None:
    """As when the first token arrives: from then on, the whole answer's deadline counts."""
    expiries = Expiries(loop)
    began = loop.time()
    with make_deadline(loop, expiries, 10.0, began + 0.1) as deadline:
        deadline.due = began + 0.1
        deadline.end = deadline.due = began + 0.7
        loop.advance(0.4)
        assert not expiries.at
        assert loop.num_timers_run == 1
        loop.advance(0.5)
    assert expiries.at == [began + 0.7]


def test_end_that_passes_while_nobody_waits_expires_soon_after_the_next_wait(
    loop: VirtualLoop,
) -> None:
    expiries = Expiries(loop)
    with make_deadline(loop, expiries, 0.5, loop.time() + 0.1) as deadline:
        loop.advance(2)
        assert not expiries.at
        waiting = loop.time()
        deadline.due = deadline.end
        loop.advance(1)
    [expired_at] = expiries.at
    assert expired_at - waiting <= 0.05


def test_nothing_expires_after_the_stream_is_left(loop: VirtualLoop) -> None:
    expiries = Expiries(loop)
    with make_deadline(loop, expiries, 0.05, loop.time() + 60) as deadline:
        deadline.due = loop.time() + 0.05
    assert loop.is_idle
    loop.advance(1)
    assert not expiries.at
