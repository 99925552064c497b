"""Prometheus metrics that cost the event loop next to nothing to update.

The library's own metrics take a lock for each change and another to find the right labels, and a
request changes a dozen. These change on one thread only. They become samples when `/metrics` is
read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector


class Counter(Collector):
    """A counter, with or without labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: defaultdict[tuple[str, ...], float] = defaultdict(float)
        if not labels:
            self._values[()] = 0

    def add(self, amount: float = 1, *labels: str) -> None:
        """`labels` are the values in the order of the names. Raises ValueError if some lack."""
        if len(labels) != len(self._labels):
            raise ValueError(f"{self._name} has the labels {self._labels}, not {labels}")
        self._values[labels] += amount

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class Gauge(Collector):
    """A gauge. Its owner sets `value`."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name, self._documentation = name, documentation
        self.value = 0

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(self._name, self._documentation, value=self.value)


class Histogram(Collector):
    """A histogram of seconds."""

    def __init__(self, name: str, documentation: str, buckets_s: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = tuple(buckets_s)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterable[Metric]:
        labels = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(labels, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(
            self._name, self._documentation, buckets=buckets, sum_value=self._sum_s
        )
