"""A worker that drains gets nothing new, and what runs there is finished there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from serving.errors import NoInstances
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over, token
from waiting import until

LAST = {"finish_reason": "stop"}


async def test_draining_worker_finishes_its_stream_while_new_requests_go_elsewhere(
    tmp_path: Path,
) -> None:
    draining = ScriptedWorker((0.0, token(1)))
    other = ScriptedWorker((0.0, token(7, **LAST)), name="agg-1")
    async with pipeline_over(tmp_path, draining, other) as connected:
        running = asyncio.create_task(connected.answer())
        await until(lambda: len(draining.requests) == 1)
        draining.server.announce_drain()
        await until(lambda: connected.routable() == ["agg-1"])
        assert [await connected.answer() for _ in range(4)] == [[7]] * 4

        connected.instances.down("agg-0", 1)
        assert [await connected.answer() for _ in range(4)] == [[7]] * 4
        draining.send(token(2), draining.requests[0])
        draining.send(token(3, **LAST), draining.requests[0])
        assert await running == [1, 2, 3], "by the worker that began it"
        assert len(draining.requests) == 1
        assert not draining.aborted.is_set()


async def test_connection_to_a_drained_worker_ends_with_it(tmp_path: Path) -> None:
    draining, other = ScriptedWorker(), ScriptedWorker(name="agg-1")
    async with pipeline_over(tmp_path, draining, other) as connected:
        draining.server.announce_drain()
        await until(lambda: connected.routable() == ["agg-1"])
        assert [row["instance_id"] for row in connected.instances.describe()] == ["agg-0", "agg-1"]
        connected.instances.down("agg-0", 1)
        assert [row["instance_id"] for row in connected.instances.describe()] == ["agg-1"]
        assert draining.server.num_frontends == 1
        await draining.server.close()
        await until(lambda: "keep-agg-0" not in {task.get_name() for task in asyncio.all_tasks()})


async def test_worker_that_drains_already_when_a_frontend_connects_gets_nothing(
    tmp_path: Path,
) -> None:
    draining = ScriptedWorker((0.0, token(1, **LAST)))
    async with pipeline_over(tmp_path) as connected:
        draining.server.announce_drain()
        connected.instances.up(await draining.start(tmp_path))
        try:
            await until(lambda: bool(connected.instances.describe()))
            await until(lambda: connected.routable() == [])
            with pytest.raises(NoInstances):
                await connected.answer()
            assert draining.requests == []
            assert connected.pipeline.ready() == (False, "no agg worker is registered")
        finally:
            await draining.server.close()


async def test_successor_of_a_draining_worker_is_kept_when_the_old_one_ends(
    tmp_path: Path,
) -> None:
    old, new = ScriptedWorker(), ScriptedWorker((0.0, token(7, **LAST)), epoch=2)
    async with pipeline_over(tmp_path, old) as connected:
        old.server.announce_drain()
        await until(lambda: connected.routable() == [])
        connected.instances.down("agg-0", 1)
        (tmp_path / "new").mkdir()
        await connected.add(await new.start(tmp_path / "new"))
        try:
            await old.server.close()
            await until(
                lambda: [task.get_name() for task in asyncio.all_tasks()].count("keep-agg-0") == 1
            )
            assert await connected.answer() == [7]
        finally:
            await new.server.close()


async def test_worker_that_is_gone_without_draining_loses_its_stream_to_another(
    tmp_path: Path,
) -> None:
    gone = ScriptedWorker((0.0, token(1)))
    other = ScriptedWorker((0.0, token(7, **LAST)), name="agg-1")
    async with pipeline_over(tmp_path, gone, other) as connected:
        running = asyncio.create_task(connected.answer())
        await until(lambda: len(gone.requests) == 1)
        connected.instances.down("agg-0", 1)
        assert (await running)[-1:] == [7]
