"""Deadlines that cost no timer per output."""

from __future__ import annotations

import asyncio

import pytest
from serving.frontend.stream_deadline import StreamDeadline


class Told:
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self) -> None:
        self.at.append(asyncio.get_running_loop().time())


async def test_gives_up_once_when_nothing_came() -> None:
    told, loop = Told(), asyncio.get_running_loop()
    began = loop.time()
    with StreamDeadline(0.1, began + 60, told) as deadline:
        deadline.due = began + 0.1
        await asyncio.sleep(0.4)
    assert len(told.at) == 1
    # The loop fires a timer up to one clock resolution early.
    assert 0.09 < told.at[0] - began < 0.3


async def test_outputs_in_time_and_callers_that_take_their_time_are_fine() -> None:
    told, loop = Told(), asyncio.get_running_loop()
    with StreamDeadline(0.1, loop.time() + 60, told) as deadline:
        for _ in range(5):
            deadline.due = loop.time() + 0.1
            await asyncio.sleep(0.05)
        deadline.due = None
        await asyncio.sleep(0.3)
        assert not told.at
        deadline.due = set_at = loop.time() + 0.1
        await asyncio.sleep(0.3)
    assert len(told.at) == 1
    assert told.at[0] - set_at < 0.15


async def test_end_of_it_all_comes_before_the_next_output_is_due() -> None:
    told, loop = Told(), asyncio.get_running_loop()
    began = loop.time()
    with StreamDeadline(10.0, began + 0.1, told) as deadline:
        deadline.due = began + 0.1
        await asyncio.sleep(0.3)
    assert len(told.at) == 1
    assert told.at[0] - began < 0.3


async def test_end_that_is_put_off_is_no_end_and_costs_no_checking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A first token came, say: now the whole answer has its deadline."""
    told, loop = Told(), asyncio.get_running_loop()
    num_checks, look = 0, StreamDeadline._check

    def counted(patience: StreamDeadline) -> None:
        nonlocal num_checks
        num_checks += 1
        look(patience)

    monkeypatch.setattr(StreamDeadline, "_check", counted)
    began = loop.time()
    with StreamDeadline(10.0, began + 0.1, told) as deadline:
        deadline.due = began + 0.1
        deadline.end = deadline.due = began + 0.7
        await asyncio.sleep(0.4)
        assert not told.at
        assert num_checks == 1
        await asyncio.sleep(0.5)
    assert len(told.at) == 1


async def test_nothing_is_told_after_the_stream_was_left() -> None:
    told, loop = Told(), asyncio.get_running_loop()
    with StreamDeadline(0.05, loop.time() + 60, told) as deadline:
        deadline.due = loop.time() + 0.05
    await asyncio.sleep(0.15)
    assert not told.at
