"""Counters of a router and of the event plane, as samples for `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.events import EventCounters
from serving.kv_router.router import KvRouter


class RouterMetrics(Collector):
    """Reads the counters when `/metrics` is read."""

    def __init__(self, router: KvRouter) -> None:
        self._router = router

    def _breakers(self) -> Iterable[Metric]:
        avoided = GaugeMetricFamily(
            "serving_breaker_open",
            "1 while an instance that failed is avoided or on trial, else 0.",
            labels=["instance"],
        )
        openings = CounterMetricFamily(
            "serving_breaker_openings",
            "Times that routing avoided an instance for a while because it failed.",
            labels=["instance"],
        )
        for state in self._router.state():
            avoided.add_metric([state.info.instance_id], float(state.breaker != "closed"))
            openings.add_metric([state.info.instance_id], state.openings)
        yield avoided
        yield openings

    def collect(self) -> Iterable[Metric]:
        blocks = "Blocks that the prefix index knows."
        yield GaugeMetricFamily("serving_kv_index_blocks", blocks, self._router.indexed_blocks)
        counters = CounterMetricFamily(
            "serving_kv_index",
            "KV event batches and snapshots by outcome, and blocks evicted from the index.",
            labels=["kind"],
        )
        totals = msgspec.structs.asdict(self._router.counters)
        for kind, total in {**totals, "evicted_blocks": self._router.evicted_blocks}.items():
            counters.add_metric([kind], total)
        yield counters
        yield from self._breakers()


class EventPlaneMetrics(Collector):
    """Reads the counters when `/metrics` is read."""

    def __init__(self, counters: EventCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        plane = CounterMetricFamily(
            "serving_event_plane", "Messages over NATS by outcome.", labels=["kind"]
        )
        for kind, total in vars(self._counters).items():
            plane.add_metric([kind], total)
        yield plane
