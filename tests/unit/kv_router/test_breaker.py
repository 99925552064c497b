"""When an instance that failed gets requests again."""

from __future__ import annotations

from random import Random

import pytest
from serving.kv_router.breaker import ERRORS, FIRST_S, JITTER, LONGEST_S, Breaker


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(Random(1))


def pause(breaker: Breaker, now_s: float) -> float:
    """How long it stays open from `now_s` on."""
    for step in range(10_000):
        if breaker.state(now_s + step / 100) != "open":
            return step / 100
    raise AssertionError("for good")


def test_each_failure_in_a_row_doubles_the_pause_up_to_the_longest(breaker: Breaker) -> None:
    now_s = 0.0
    for failure in range(8):
        breaker.failed(now_s)
        expected = min(LONGEST_S, FIRST_S * 2**failure)
        found = pause(breaker, now_s)
        assert (1 - JITTER) * expected <= found <= (1 + JITTER) * expected + 0.01
        now_s += found
    assert breaker.openings == 8


def test_a_half_open_breaker_admits_one_probe_at_a_time(breaker: Breaker) -> None:
    assert breaker.request_sent() is False
    breaker.failed(0.0)
    assert not breaker.admits(1.0)
    assert breaker.admits(10.0)
    assert breaker.request_sent() is True
    assert not breaker.admits(10.0), "a second one beside it"
    assert breaker.state(10.0) == "half_open"
    breaker.succeeded()
    assert breaker.state(10.0) == "closed"
    assert breaker.admits(10.0)


def test_a_cancelled_probe_lets_the_next_request_probe(breaker: Breaker) -> None:
    breaker.failed(0.0)
    assert breaker.request_sent()
    breaker.probe_ended()
    assert breaker.admits(10.0)
    assert breaker.state(10.0) == "half_open"


def test_a_failed_probe_opens_the_breaker_for_longer(breaker: Breaker) -> None:
    breaker.failed(0.0)
    first = pause(breaker, 0.0)
    breaker.request_sent()
    breaker.failed(10.0)
    assert pause(breaker, 10.0) > first


def test_only_errors_in_a_row_open_the_breaker(breaker: Breaker) -> None:
    for _ in range(3):
        for _ in range(ERRORS - 1):
            breaker.answered_error(0.0)
        breaker.finished()
    assert breaker.state(0.0) == "closed"
    for _ in range(ERRORS):
        breaker.answered_error(0.0)
    assert breaker.state(0.0) == "open"


def test_an_error_of_the_probe_opens_the_breaker_again(breaker: Breaker) -> None:
    breaker.failed(0.0)
    breaker.request_sent()
    breaker.answered_error(5.0)
    assert breaker.state(5.0) == "open"
