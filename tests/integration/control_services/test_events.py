"""The event plane against a real nats-server that is killed, restarted, stopped and overrun."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest
from integration.services import Nats
from serving.config import RouterConfig
from serving.errors import DeadlineExceeded, InstanceLost
from serving.events import EventPlane, PlaneLimits
from serving.kv_router.router import KvRouter, PromptHashes
from serving.load_report import LoadReport
from serving.protocol import BlocksRemoved, BlocksStored, InstanceInfo, KvEventBatch, ModelCard
from waiting import until

pytestmark = pytest.mark.integration


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Nats]:
    with Nats(tmp_path / "nats") as service:
        assert isinstance(service, Nats)
        yield service


def report(num_running: int, instance_id: str = "a") -> LoadReport:
    return LoadReport(instance_id, 1, num_running, 0, 0, 0, 0, 10)


class Receiver:
    """Everything that a frontend received, in order."""

    def __init__(self) -> None:
        self.batches: list[KvEventBatch] = []
        self.reports: list[LoadReport] = []
        self.num_reconnects = 0

    @property
    def seqs(self) -> list[int]:
        return [batch.seq for batch in self.batches]

    def reconnected(self) -> None:
        self.num_reconnects += 1

    async def attach(self, frontend: EventPlane) -> None:
        frontend.on_reconnect = self.reconnected
        await frontend.subscribe(self.batches.append, self.reports.append)


def connect(
    nats: Nats, namespace: str = "ns", **limits: int | float
) -> AbstractAsyncContextManager[EventPlane]:
    return EventPlane.connect(nats.url, namespace, nats.token, PlaneLimits(**limits))  # type: ignore[arg-type]


async def connected(worker: EventPlane, frontend: EventPlane) -> None:
    await until(lambda: worker.connected and frontend.connected)


async def test_events_and_reports_arrive_numbered_and_in_order(nats: Nats) -> None:
    receiver = Receiver()
    async with connect(nats) as worker, connect(nats) as frontend, connect(nats, "other") as other:
        stranger = Receiver()
        await stranger.attach(other)
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 7, list)
        await connected(worker, frontend)
        await until(lambda: other.connected)
        for number in range(200):
            worker.publish_kv([BlocksStored(None, [number]), BlocksRemoved([number])])
            worker.publish_load(report(number))
        worker.publish_kv([])  # a step that changed nothing
        worker.publish_kv([BlocksRemoved([1])], report(200))
        await until(lambda: len(receiver.reports) == 201 and len(receiver.batches) == 201)
        assert receiver.seqs == list(range(1, 202)) == [worker.seq - 200 + n for n in range(201)]
        assert receiver.batches[3] == KvEventBatch(
            "a", 7, 4, [BlocksStored(None, [3]), BlocksRemoved([3])]
        )
        assert sorted(one.num_running for one in receiver.reports) == list(range(201))
        assert stranger.batches == []


async def test_event_larger_than_a_message_is_split_with_a_number_each(nats: Nats) -> None:
    receiver = Receiver()
    hashes = [2**63 + n for n in range(300_000)]  # 2.7 MB
    async with connect(nats) as worker, connect(nats) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, list)
        await connected(worker, frontend)
        worker.publish_kv([BlocksStored(None, hashes)], report(5))
        await until(lambda: sum(map(num_hashes, receiver.batches)) == len(hashes))
        assert receiver.seqs == [1, 2, 3]
        assert [batch.load for batch in receiver.batches] == [None, None, report(5)]
        assert worker.counters.dropped == 0


def num_hashes(batch: KvEventBatch) -> int:
    return sum(len(event.block_hashes) for event in batch.events if isinstance(event, BlocksStored))


@pytest.mark.parametrize("num_blocks", [0, 3, 300_000])
async def test_snapshot_of_any_size_arrives_whole(nats: Nats, num_blocks: int) -> None:
    held = [2**63 + n for n in range(num_blocks)]
    async with connect(nats) as worker, connect(nats) as frontend:
        await worker.serve_snapshots("a", 7, lambda: held)
        await connected(worker, frontend)
        worker.publish_kv([BlocksStored(None, [1])])
        snapshot = await frontend.request_snapshot("a", 10)
        assert (snapshot.instance_id, snapshot.epoch, snapshot.seq) == ("a", 7, 1)
        assert snapshot.block_hashes == held


async def test_snapshot_request_to_an_unknown_instance_fails_at_once(nats: Nats) -> None:
    async with connect(nats) as frontend:
        await until(lambda: frontend.connected)
        asked = time.monotonic()
        with pytest.raises(InstanceLost, match="nobody"):
            await frontend.request_snapshot("ghost", 30)
        assert time.monotonic() - asked < 2


async def test_unanswered_snapshot_request_runs_into_its_deadline(nats: Nats) -> None:
    silence = Silence()
    async with connect(nats) as mute, connect(nats) as frontend:
        await mute._connection.listen("ns.snapshot.a", silence.receive)
        await connected(mute, frontend)
        with pytest.raises(DeadlineExceeded, match="snapshot"):
            await frontend.request_snapshot("a", 0.2)


class Silence:
    """Receives requests and never answers."""

    def __init__(self) -> None:
        self.num_requests = 0

    async def receive(self, _: object) -> None:
        self.num_requests += 1


async def test_disconnect_fails_a_waiting_snapshot_at_once(nats: Nats) -> None:
    silence = Silence()
    async with connect(nats) as mute, connect(nats) as frontend:
        await mute._connection.listen("ns.snapshot.a", silence.receive)
        await connected(mute, frontend)
        asked = asyncio.create_task(frontend.request_snapshot("a", 60))
        await until(lambda: silence.num_requests == 1)
        nats.kill()
        with pytest.raises(InstanceLost):
            await asyncio.wait_for(asked, 5)
        with pytest.raises(InstanceLost, match="disconnected"):
            await frontend.request_snapshot("a", 60)


async def test_restarted_server_is_found_and_sequence_numbers_show_the_gap(nats: Nats) -> None:
    receiver = Receiver()
    held = [1, 2, 3]
    async with connect(nats) as worker, connect(nats) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, lambda: held)
        await connected(worker, frontend)
        worker.publish_kv([BlocksStored(None, [1])])
        await until(lambda: receiver.seqs == [1])
        assert receiver.num_reconnects == 1
        nats.kill()
        await until(lambda: not worker.connected)
        worker.publish_kv([BlocksStored(1, [2])])
        worker.publish_kv([BlocksStored(2, [3])])
        assert worker.counters.dropped == 2
        nats.start()
        started = time.monotonic()
        await connected(worker, frontend)
        assert time.monotonic() - started < 2
        await until(lambda: receiver.num_reconnects == 2)
        worker.publish_kv([BlocksRemoved([1])])
        await until(lambda: worker.seq in receiver.seqs)
        assert not {2, 3} & set(receiver.seqs)
        assert receiver.batches[-1].events == [BlocksRemoved([1])]
        assert (await frontend.request_snapshot("a", 5)).seq == worker.seq


async def test_lost_events_are_noticed_even_when_no_event_follows(nats: Nats) -> None:
    receiver = Receiver()
    async with connect(nats, queue_bytes=2000) as worker, connect(nats) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, list)
        await connected(worker, frontend)
        for number in range(100):  # one burst; the last ones find the queue full
            worker.publish_kv([BlocksStored(None, [number] * 5)])
        assert 0 < worker.counters.dropped < 100
        await until(lambda: receiver.seqs[-1:] == [101])
        assert receiver.batches[-1].events == []
        assert receiver.seqs[-2] < 100


async def test_server_that_starts_later_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nats, receiver = Nats(tmp_path), Receiver()
    async with connect(nats) as worker, connect(nats) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, list)
        worker.publish_load(report(1))
        assert not worker.connected
        assert worker.counters.dropped == 1
        await until(lambda: "no connection to NATS" in caplog.text)
        with nats:
            await connected(worker, frontend)
            worker.publish_load(report(2))
            await until(lambda: [one.num_running for one in receiver.reports] == [2])


async def test_token_is_read_again_when_the_server_wants_another(
    nats: Nats, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("wrong-secret\n")
    async with EventPlane.connect(nats.url, "ns", token_file) as worker:
        await until(lambda: refusals(caplog) == 1)
        assert not worker.connected
        token_file.write_text(nats.token + "\n")
        await until(lambda: worker.connected)
        nats.kill()
        nats.token = "another-secret"
        nats.start()
        await until(lambda: refusals(caplog) == 2)
        assert not worker.connected
        token_file.write_text(nats.token)
        await until(lambda: worker.connected)
    assert "secret" not in caplog.text


def refusals(caplog: pytest.LogCaptureFixture) -> int:
    """Connections that the server refused, as the log shows them."""
    return sum("authorization" in record.getMessage().lower() for record in caplog.records)


async def test_hanging_server_is_disconnected_and_found_again(nats: Nats) -> None:
    async with connect(nats, ping_s=0.2, call_s=1) as worker:
        await until(lambda: worker.connected)
        nats.signal(signal.SIGSTOP)
        await until(lambda: not worker.connected)
        nats.signal(signal.SIGCONT)
        await until(lambda: worker.connected)


async def test_garbage_is_counted_and_does_not_stop_the_rest(nats: Nats) -> None:
    receiver = Receiver()
    async with connect(nats) as worker, connect(nats) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, list)
        await connected(worker, frontend)
        worker._enqueue("ns.kv.a", b"\xff garbage")
        worker._enqueue("ns.load.a", b"")
        worker.publish_kv([BlocksRemoved([1])])
        await until(lambda: receiver.seqs == [1])
        await until(lambda: frontend.counters.undecodable == 2)


async def test_receiver_that_cannot_keep_up_is_noticed(nats: Nats) -> None:
    receiver = Receiver()
    async with connect(nats) as worker, connect(nats, pending_messages=4) as frontend:
        await receiver.attach(frontend)
        await worker.serve_snapshots("a", 1, list)
        await connected(worker, frontend)
        for number in range(500):
            worker.publish_kv([BlocksStored(None, [number])])
        counters = frontend.counters
        await until(lambda: counters.received + counters.slow_consumer == 500)
        assert counters.slow_consumer > 0
        worker.publish_kv([BlocksStored(None, [1])])
        await until(lambda: receiver.seqs[-1] == 501)
        assert len(receiver.seqs) == 501 - counters.slow_consumer  # and the numbers show it
        assert receiver.num_reconnects > 1  # and so does the plane, should nothing follow


async def test_closing_the_event_plane_ends_every_task(nats: Nats) -> None:
    before = asyncio.all_tasks()
    async with connect(nats) as worker:
        await until(lambda: worker.connected)
        assert len(asyncio.all_tasks()) > len(before)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


class IndexedFrontend:
    """The router behind a real event plane, as `frontend/instances.py` joins them."""

    def __init__(self, events: EventPlane) -> None:
        self.router = KvRouter(RouterConfig())
        self._events = events
        events.on_reconnect = self.router.distrust_index

    async def attach(self) -> None:
        def ignore(report: LoadReport) -> None:
            """Load is not what this is about."""

        await self._events.subscribe(self.router.on_kv, ignore)

    async def synchronise(self) -> None:
        for name in self.router.needs_snapshot():
            got = await self._events.request_snapshot(name, 5)
            self.router.on_snapshot(name, got.epoch, got.seq, got.block_hashes, got.host_hashes)


CARD = ModelCard("m", "", 4096, 16, "salt", "", 0)


def registered(name: str, epoch: int = 1) -> InstanceInfo:
    return InstanceInfo(name, epoch, "agg", [], "", CARD, 1000, 16, 1, "h")


async def test_restarted_frontend_routes_by_cache_within_a_second(nats: Nats) -> None:
    """64 workers of 4,000 blocks: it asks each for a snapshot, and the first prompts place them."""
    rng = random.Random(4)
    chains = {
        f"w{n}": [[rng.getrandbits(64) for _ in range(400)] for _ in range(10)] for n in range(64)
    }
    async with AsyncExitStack() as stack:
        for name, held in chains.items():
            worker = await stack.enter_async_context(connect(nats))
            blocks = {block for chain in held for block in chain}
            await worker.serve_snapshots(name, 1, lambda blocks=blocks: blocks)
            await until(lambda worker=worker: worker.connected)
        events = await stack.enter_async_context(connect(nats))
        await until(lambda: events.connected)
        frontend = IndexedFrontend(events)
        await frontend.attach()
        started, cpu = time.monotonic(), time.process_time()
        for name in chains:
            frontend.router.add_instance(registered(name))
        await frontend.synchronise()
        for name, held in chains.items():
            with frontend.router.route(PromptHashes(6400, held[3]), "agg", request_id="r") as route:
                assert (route.instance_id, route.overlap_blocks) == (name, 400)
        # The 64 workers answer from this very process; alone it takes a part of that.
        assert min(time.monotonic() - started, time.process_time() - cpu) < 1.0


async def test_index_converges_through_restarts_losses_and_slow_receivers(nats: Nats) -> None:
    """However many events are lost, the next snapshot makes the index equal to the worker's blocks."""
    rng = random.Random(5)
    held: set[int] = set()
    async with connect(nats, queue_messages=100) as worker, connect(nats) as events:
        await worker.serve_snapshots("w0", 1, lambda: held)
        frontend = IndexedFrontend(events)
        await frontend.attach()
        frontend.router.add_instance(registered("w0"))
        await connected(worker, events)

        def work(steps: int) -> None:
            for _ in range(steps):
                new = [rng.getrandbits(64) for _ in range(8)]
                gone = rng.sample(sorted(held), min(len(held), 3))
                held.update(new)
                held.difference_update(gone)
                worker.publish_kv([BlocksRemoved(gone), BlocksStored(None, new)])

        async def converged() -> bool:
            await frontend.synchronise()
            return frontend.router.indexed("w0") == held

        work(50)
        await until_async(converged)
        nats.kill()  # what is published now is lost
        await until(lambda: not worker.connected)
        work(50)
        nats.start()
        await connected(worker, events)
        work(10)
        await until_async(converged)
        dropped = worker.counters.dropped
        work(150)  # a burst that fills the worker's queue
        assert worker.counters.dropped > dropped
        published = worker.counters.published
        await until(lambda: worker.counters.published >= published + 100)
        work(1)
        await until_async(converged)
        assert frontend.router.counters.gaps > 0
        assert frontend.router.counters.snapshots > 1


async def until_async(condition: Callable[[], Awaitable[bool]], deadline_s: float = 10) -> None:
    async with asyncio.timeout(deadline_s):
        while not await condition():  # noqa: ASYNC110 (nothing tells when)
            await asyncio.sleep(0.02)
