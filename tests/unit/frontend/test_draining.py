"""A worker that drains gets nothing new, and what runs there is finished there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from serving.errors import NoInstances, Overloaded
from serving.protocol import EngineRequest
from serving.rpc import liveness
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


async def test_worker_whose_registration_is_deleted_finishes_its_stream_and_gets_nothing_new(
    tmp_path: Path,
) -> None:
    """A key that vanishes from etcd says nothing of the worker, which answers."""
    deleted = ScriptedWorker((0.0, token(1)))
    other = ScriptedWorker((0.0, token(7, **LAST)), name="agg-1")
    async with pipeline_over(tmp_path, deleted, other) as connected:
        running = asyncio.create_task(connected.answer())
        await until(lambda: len(deleted.requests) == 1)
        connected.instances.down("agg-0", 1)
        assert connected.routable() == ["agg-1"]
        assert [await connected.answer() for _ in range(4)] == [[7]] * 4
        deleted.send(token(2), deleted.requests[0])
        await asyncio.sleep(0.3)
        deleted.send(token(3, **LAST), deleted.requests[0])
        assert await running == [1, 2, 3]
        await until(lambda: deleted.server.num_frontends == 0)
        assert not deleted.aborted.is_set()


async def test_deleted_registration_that_returns_keeps_its_connection(tmp_path: Path) -> None:
    worker = ScriptedWorker((0.0, token(1)))
    async with pipeline_over(tmp_path, worker) as connected:
        running = asyncio.create_task(connected.answer())
        await until(lambda: len(worker.requests) == 1)
        info = connected.instances.client("agg-0").info
        connected.instances.down("agg-0", 1)
        assert connected.pipeline.ready()[0] is False
        connected.instances.up(info)
        assert connected.pipeline.ready()[0] is True
        worker.send(token(3, **LAST), worker.requests[0])
        assert await running == [1, 3]
        await asyncio.sleep(0.3)
        assert worker.server.num_frontends == 1


async def test_departed_worker_that_stops_answering_loses_its_stream_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "PING_S", 0.02)
    gone = ScriptedWorker((0.0, token(1)))
    other = ScriptedWorker((0.0, token(7, **LAST)), name="agg-1")
    async with pipeline_over(tmp_path, gone, other) as connected:
        running = asyncio.create_task(connected.answer())
        await until(lambda: len(gone.requests) == 1)
        connected.instances.down("agg-0", 1)
        [connection] = gone.server._connections
        monkeypatch.setattr(connection, "received", lambda message: None)  # as if stopped
        assert (await running)[-1:] == [7]


async def test_request_that_crosses_the_announcement_of_a_drain_is_served_elsewhere(
    tmp_path: Path,
) -> None:
    class Refusing(ScriptedWorker):
        def on_generate(self, request: EngineRequest) -> None:
            self.requests.append(request)
            raise Overloaded("agg-0 is draining")

    refusing = Refusing()
    other = ScriptedWorker((0.0, token(7, **LAST)), name="agg-1")
    async with pipeline_over(tmp_path, refusing, other) as connected:
        assert [await connected.answer() for _ in range(4)] == [[7]] * 4
        assert refusing.requests
        assert connected.distrusted() == []
