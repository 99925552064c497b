"""Frontends take turns when, and only when, their decisions coincide."""

import pytest
from serving.kv_router.others import (
    LEARNING,
    LONGEST_TURN_S,
    MAX_TURNS,
    MIN_PROMPT_TOKENS,
    NEWS_PER_TURN,
    TURN_S,
    Others,
)

LONG = 10 * MIN_PROMPT_TOKENS
NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def bursts(others: Others, num_bursts: int, heard: int = 2) -> None:
    for number in range(num_bursts):
        now_s = 10.0 * number
        others.decided(now_s)
        if heard:
            others.heard(heard, now_s + TURN_S / 2)
    others.decided(10.0 * num_bursts)


def test_a_frontend_alone_never_waits() -> None:
    others = Others()
    bursts(others, 100, heard=0)
    assert others.turn_s(LONG) == 0.0


def test_in_bursts_each_waits_longer_than_the_one_before() -> None:
    waits = []
    for name in NAMES:
        others = Others()
        others.set_frontends(name, [each for each in NAMES if each != name])
        bursts(others, 50)
        waits.append(others.turn_s(LONG))
    assert waits == [min(n, MAX_TURNS) * TURN_S for n in range(len(NAMES))]


def test_those_that_just_started_take_turns_until_they_know_better() -> None:
    others = Others()
    assert others.turn_s(LONG) == 0.0, "alone"
    others.set_frontends("b", ["a"])
    assert others.turn_s(LONG) == TURN_S
    bursts(others, 20, heard=0)
    assert others.turn_s(LONG) == 0.0


def test_short_prompts_do_not_wait() -> None:
    others = Others()
    others.set_frontends("b", ["a"])
    bursts(others, 50)
    assert others.turn_s(MIN_PROMPT_TOKENS - 1) == 0.0


def test_others_that_decide_at_other_times_are_no_reason_to_wait() -> None:
    others = Others()
    others.set_frontends("b", ["a"])
    for number in range(200):
        others.decided(number * 1.0)
        others.heard(3, number * 1.0 + 0.5)
    assert others.turn_s(LONG) == 0.0


def test_waiting_ends_when_bursts_do() -> None:
    others = Others()
    others.set_frontends("b", ["a"])
    bursts(others, 50)
    assert others.turn_s(LONG) > 0
    bursts(others, int(3 / LEARNING), heard=0)
    assert others.turn_s(LONG) == 0.0


def test_turns_are_as_long_as_news_take_within_limits() -> None:
    others = Others()
    others.set_frontends("b", ["a"])
    assert others.turn_s(LONG) == TURN_S
    for _ in range(200):
        others.echoed(0.008)
    assert others.turn_s(LONG) == pytest.approx(NEWS_PER_TURN * 0.008, rel=0.01)
    for _ in range(200):
        others.echoed(1.0)
    assert others.turn_s(LONG) == LONGEST_TURN_S
    for _ in range(200):
        others.echoed(0.001)
    assert others.turn_s(LONG) == TURN_S
