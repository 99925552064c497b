"""A worker that lives and does not compute gets no requests, and loses those that it has."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from serving.rpc import liveness
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over, token
from waiting import until

LAST = (0.0, token(8, finish_reason="length"))
FIRST = (0.0, token(7))


@pytest.fixture(autouse=True)
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PING_S", 0.02)


async def test_requests_leave_a_worker_whose_engine_is_stuck_and_return_when_it_is_not(
    tmp_path: Path,
) -> None:
    """The tokens that it gave stay: the answer continues on the other worker."""
    stuck, good = ScriptedWorker(FIRST, name="agg-0"), ScriptedWorker(LAST, name="agg-1")
    async with pipeline_over(tmp_path, stuck, good) as connected:
        answer = asyncio.create_task(connected.answer())
        await until(lambda: stuck.requests)
        stuck.server.late_s = lambda: 7.0
        assert await answer == [7, 8]
        assert connected.routable() == ["agg-1"]
        [row, _] = connected.instances.describe()
        assert "stuck in a step for 7 s" in row["wedged"]
        await until(stuck.aborted.is_set)
        stuck.server.late_s = lambda: 0.0
        await until(lambda: connected.routable() == ["agg-1", "agg-0"])
        assert connected.instances.describe()[0]["wedged"] == ""


async def test_worker_that_does_not_answer_pings_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, good = ScriptedWorker(FIRST, name="agg-0"), ScriptedWorker(LAST, name="agg-1")
    async with pipeline_over(tmp_path, silent, good) as connected:
        [connection] = silent.server._connections
        monkeypatch.setattr(connection, "received", lambda message: None)  # as if stopped
        assert await connected.answer() in ([8], [7, 8])
        await until(lambda: connected.routable() == ["agg-1"])
        assert await connected.answer() == [8]


async def test_last_worker_keeps_its_requests_while_it_is_stuck(tmp_path: Path) -> None:
    stuck = ScriptedWorker(FIRST, (0.3, token(8, finish_reason="length")))
    async with pipeline_over(tmp_path, stuck) as connected:
        stuck.server.late_s = lambda: 7.0
        assert await connected.answer() == [7, 8]
        assert connected.routable() == ["agg-0"]
        assert connected.pipeline.ready() == (True, "")
