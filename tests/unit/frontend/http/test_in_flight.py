"""When a refused client should try again."""

from __future__ import annotations

import pytest
from serving.errors import Overloaded
from serving.frontend.http.body import read_body
from serving.frontend.http.limits import ArrivingBodies, InFlight, TooManyInFlight
from serving.frontend.metrics.collectors import Gauge


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(limit: int, clock: Clock) -> InFlight:
    return InFlight(limit, Gauge("in_flight", ""), clock)


def end_every(in_flight: InFlight, clock: Clock, seconds: float, count: int) -> None:
    for _ in range(count):
        with in_flight.hold(1):
            clock.now_s += seconds


@pytest.mark.parametrize("seconds", [2.0, 5.0, 20.0])
def test_retry_after_follows_the_rate_at_which_samples_end(clock: Clock, seconds: float) -> None:
    in_flight = make(2, clock)
    end_every(in_flight, clock, seconds, 60)
    assert in_flight.retry_after_s() == pytest.approx(seconds, rel=0.75)


def test_retry_after_is_between_a_second_and_a_minute(clock: Clock) -> None:
    in_flight = make(2, clock)
    assert in_flight.retry_after_s() == 1.0  # nothing is known yet
    end_every(in_flight, clock, 0.001, 1000)
    assert in_flight.retry_after_s() == 1.0
    end_every(in_flight, clock, 25.0, 10)
    clock.now_s += 25.0
    assert in_flight.retry_after_s() == 60.0


def test_request_beyond_the_limit_is_refused_with_a_retry_after(clock: Clock) -> None:
    in_flight = make(1, clock)
    end_every(in_flight, clock, 5.0, 60)
    with in_flight.hold(1):
        expected = in_flight.retry_after_s()
        with pytest.raises(TooManyInFlight) as refused, in_flight.hold(1):
            pass
    assert 1.0 < refused.value.retry_after_s == pytest.approx(expected)
    assert in_flight.count == 0


async def test_bytes_of_bodies_that_arrive_are_bounded_and_returned() -> None:
    arriving = ArrivingBodies(limit=10)
    arriving.add(6)  # of another request

    async def read(*parts: bytes) -> bytes:
        messages = [
            {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
            for index, part in enumerate(parts)
        ]

        async def receive() -> dict[str, object]:
            return messages.pop(0)

        return await read_body({"headers": []}, receive, 100, timeout_s=5, arriving=arriving)

    assert await read(b"ab", b"cd") == b"abcd"
    assert arriving.num_bytes == 6
    with pytest.raises(Overloaded, match="arriving already"):
        await read(b"abc", b"de")
    assert arriving.num_bytes == 6
