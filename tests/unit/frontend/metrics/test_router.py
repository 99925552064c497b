"""What `/metrics` says of the router and of the events it is fed by."""

from __future__ import annotations

from serving.config import RouterConfig
from serving.events import EventCounters
from serving.frontend.metrics.registry import Metrics
from serving.frontend.metrics.router import EventPlaneMetrics, RouterMetrics
from serving.kv_router.router import KvRouter
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard

CARD = ModelCard("m", "", 4096, 16, "salt", "", 0)


def test_event_batches_are_counted_by_outcome() -> None:
    router, counters, metrics = KvRouter(RouterConfig()), EventCounters(), Metrics()
    router.add_instance(InstanceInfo("w0", 1, "agg", [], "", CARD, 1000, 16, 1, "h"))
    metrics.add(RouterMetrics(router))
    metrics.add(EventPlaneMetrics(counters))
    router.on_kv(KvEventBatch("w0", 1, 1, []))
    router.on_kv(KvEventBatch("w0", 1, 1, []))
    router.on_kv(KvEventBatch("w0", 1, 3, []))
    router.on_kv(KvEventBatch("w0", 0, 1, []))
    counters.slow_consumer = 4
    page = metrics.render().decode()
    assert 'serving_kv_index_total{kind="gaps"} 1.0' in page
    assert 'serving_kv_index_total{kind="duplicates"} 1.0' in page
    assert 'serving_kv_index_total{kind="stale_epoch"} 1.0' in page
    assert 'serving_event_plane_total{kind="slow_consumer"} 4.0' in page
    assert "serving_kv_index_blocks 0.0" in page
