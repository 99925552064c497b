"""A worker ends when its engine computes nothing any more, and not before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving.engine.base import EngineHealth
from serving.engine.core.step_clock import FIRST_S, StepClock
from serving.worker import health
from serving.worker.health import EngineBroken, watch_engine


class AilingEngine:
    def __init__(self) -> None:
        self.state = EngineHealth()

    def health(self) -> EngineHealth:
        return self.state


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (EngineHealth("KeyError: 3"), "KeyError: 3"),
        (EngineHealth(late_s=31.0), "a step takes 31 s longer"),
    ],
)
async def test_broken_engine_disconnects_frontends_and_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch, state: EngineHealth, why: str
) -> None:
    monkeypatch.setattr(health, "POLL_S", 0.01)
    forced: list[float] = []
    monkeypatch.setattr(health, "_end_by_force_after", lambda seconds, _: forced.append(seconds))
    ailing: Any = AilingEngine()
    disconnected: list[bool] = []

    async def disconnect() -> None:
        disconnected.append(True)

    watch = asyncio.create_task(watch_engine(ailing, "agg-0", 30.0, disconnect))
    await asyncio.sleep(0.05)
    ailing.state = EngineHealth(late_s=29.0)
    await asyncio.sleep(0.05)
    assert not watch.done()
    ailing.state = state
    with pytest.raises(EngineBroken, match=why):
        await asyncio.wait_for(watch, 5)
    assert disconnected
    assert forced


class TestStepClock:
    def test_limit_follows_from_the_slowest_step_so_far(self) -> None:
        now = 0.0
        clock = StepClock(lambda: now)
        clock.begin(100)
        now = FIRST_S - 1
        assert clock.late_s() == 0
        now = FIRST_S + 1
        assert clock.late_s() == pytest.approx(1)
        now = 0.0
        clock = StepClock(lambda: now)
        clock.begin(100)
        now = 2.0
        clock.end()
        assert clock.late_s() == 0
        clock.begin(100)
        now = 2.0 + 25.0 + 3.0  # 5 s and ten times 2 s
        assert clock.late_s() == pytest.approx(3)

    def test_larger_steps_may_take_longer(self) -> None:
        now = 0.0
        clock = StepClock(lambda: now)
        clock.begin(10)
        now = 1.0
        clock.end()
        clock.begin(40)
        now = 1.0 + 44.0
        assert clock.late_s() == 0
        now = 1.0 + 46.0
        assert clock.late_s() == pytest.approx(1)

    def test_next_step_under_way_counts_from_the_end_of_the_one_before(self) -> None:
        now = 0.0
        clock = StepClock(lambda: now)
        clock.begin(10)
        clock.begin(10)
        now = 1.0
        clock.end()
        now = 15.0
        assert clock.late_s() == 0
        clock.end()
        now = 1000.0
        assert clock.late_s() == 0, "nothing is under way"
