"""The page shows what was counted."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector
from serving.frontend.metrics.collectors import Counter, Gauge, Histogram


def samples(collector: Collector) -> list[str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    page = generate_latest(registry).decode()
    return [line for line in page.splitlines() if not line.startswith("#")]


def test_counter_without_labels_starts_at_zero() -> None:
    count = Counter("tokens", "")
    assert samples(count) == ["tokens_total 0.0"]
    count.add(5)
    count.add(0.5)
    assert samples(count) == ["tokens_total 5.5"]


def test_each_combination_of_labels_has_its_own_count() -> None:
    count = Counter("requests", "", ["status", "reason"])
    assert samples(count) == []
    count.add(1, "200", "stop")
    count.add(0, "500", 'a "quoted"\none')
    count.add(2, "200", "stop")
    assert samples(count) == [
        'requests_total{reason="stop",status="200"} 3.0',
        r'requests_total{reason="a \"quoted\"\none",status="500"} 0.0',
    ]


def test_counter_needs_a_value_for_each_label() -> None:
    count = Counter("requests", "", ["status"])
    with pytest.raises(ValueError, match="labels"):
        count.add(1)


def test_gauge_shows_the_value_that_was_set() -> None:
    level = Gauge("in_flight", "")
    level.value += 3
    level.value -= 1
    assert samples(level) == ["in_flight 2.0"]


def test_histogram_buckets_include_their_bound() -> None:
    latencies = Histogram("seconds", "", (0.1, 1.0))
    for seconds in (0.1, 0.2, 5.0):
        latencies.observe(seconds)
    assert samples(latencies) == [
        'seconds_bucket{le="0.1"} 1.0',
        'seconds_bucket{le="1.0"} 2.0',
        'seconds_bucket{le="+Inf"} 3.0',
        "seconds_count 3.0",
        "seconds_sum 5.3",
    ]
