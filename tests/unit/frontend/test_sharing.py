"""Frontends tell each other what they send where, and only when there is somebody to tell."""

import asyncio
from random import Random

import pytest
from serving.config import RouterConfig
from serving.events import EventCounters
from serving.frontend import sharing
from serving.frontend.metrics import Metrics
from serving.frontend.router_metrics import RouterMetrics
from serving.frontend.sharing import Sharing
from serving.kv_router.router import KvRouter
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard, Routed, RoutedBatch

CARD = ModelCard("m", "", 4096, 16, "salt", "", 0)


class FakeNats:
    """Every frontend hears every message at once, its own included."""

    def __init__(self) -> None:
        self.listeners: list[Sharing] = []
        self.sent: list[RoutedBatch] = []
        self.counters = EventCounters()
        self.tasks: list[asyncio.Task[None]] = []

    def publish_routed(self, batch: RoutedBatch) -> None:
        self.sent.append(batch)
        for listener in list(self.listeners):
            listener.on_batch(batch)

    @property
    def routed(self) -> list[Routed]:
        return [routed for batch in self.sent for routed in batch.routed]


class Frontend:
    def __init__(self, nats: FakeNats) -> None:
        self.router = KvRouter(RouterConfig(), rng=Random(1))
        for name in ("w0", "w1"):
            info = InstanceInfo(name, 1, "agg", [], "", CARD, 1000, 16, 1, "h")
            self.router.add_instance(info)
        self.sharing = Sharing(self.router, nats)  # type: ignore[arg-type]
        nats.listeners.append(self.sharing)
        self.task = asyncio.create_task(self.sharing.stay_in_touch())
        nats.tasks.append(self.task)

    def send(self, seed: int = 0) -> str:
        tokens = [Random(seed).randrange(1000) for _ in range(160)]
        return self.router.route(tokens, "agg", request_id="r").instance_id

    def queued(self) -> list[int]:
        return sorted(one.load.queued_tokens for one in self.router.state())


@pytest.fixture
async def nats():
    nats = FakeNats()
    yield nats
    for task in nats.tasks:
        task.cancel()


async def test_a_frontend_alone_says_only_that_it_is_there(nats: FakeNats) -> None:
    frontend = Frontend(nats)
    await asyncio.sleep(0)
    frontend.send()
    await asyncio.sleep(0.02)
    [sent] = nats.sent
    assert (sent.frontend_id, sent.routed) == (frontend.sharing.frontend_id, [])


async def test_what_one_sends_weighs_on_the_decisions_of_the_other(nats: FakeNats) -> None:
    one, other = Frontend(nats), Frontend(nats)
    await asyncio.sleep(0.01)
    assert one.sharing.num_others == other.sharing.num_others == 1
    first = one.send(1)
    await asyncio.sleep(0.02)
    assert other.queued() == one.queued() == [0, 160]
    assert other.send(1) != first
    await asyncio.sleep(0.02)
    assert other.queued() == one.queued() == [160, 160]


async def test_decisions_of_one_moment_go_in_one_message(nats: FakeNats) -> None:
    one, _ = Frontend(nats), Frontend(nats)
    await asyncio.sleep(0.01)
    before = len(nats.sent)
    for seed in range(20):
        one.send(seed)
    await asyncio.sleep(0.02)
    assert len(nats.sent) == before + 1
    assert len(nats.routed) == 20


async def test_a_silent_frontend_is_forgotten(
    nats: FakeNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "HERE_EVERY_S", 0.01)
    monkeypatch.setattr(sharing, "GONE_AFTER_S", 0.1)
    one, other = Frontend(nats), Frontend(nats)
    await asyncio.sleep(0.05)
    assert one.sharing.num_others == 1
    other.task.cancel()
    await asyncio.sleep(0.3)
    assert one.sharing.num_others == 0


async def test_metrics_count_what_happened_to_events(nats: FakeNats) -> None:
    frontend, metrics = Frontend(nats), Metrics()
    metrics.add(RouterMetrics(frontend.router, nats.counters, frontend.sharing))
    frontend.router.on_kv(KvEventBatch("w0", 1, 1, []))
    frontend.router.on_kv(KvEventBatch("w0", 1, 1, []))
    frontend.router.on_kv(KvEventBatch("w0", 1, 3, []))
    frontend.router.on_kv(KvEventBatch("w0", 0, 1, []))
    nats.counters.slow_consumer = 4
    page = metrics.render().decode()
    assert 'serving_kv_index_total{kind="gaps"} 1.0' in page
    assert 'serving_kv_index_total{kind="duplicates"} 1.0' in page
    assert 'serving_kv_index_total{kind="stale_epoch"} 1.0' in page
    assert 'serving_event_plane_total{kind="slow_consumer"} 4.0' in page
    assert "serving_kv_index_blocks 0.0" in page
