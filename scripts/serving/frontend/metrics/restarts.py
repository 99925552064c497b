"""How often the programs of this machine were replaced, from the watcher's records."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.restarts import read_restarts


class RestartMetrics(Collector):
    """Reads the records when `/metrics` is read."""

    def collect(self) -> Iterable[Metric]:
        restarts = CounterMetricFamily(
            "serving_program_restarts",
            "Times that a program of this machine ended by itself and was started again.",
            labels=["program"],
        )
        down = GaugeMetricFamily(
            "serving_program_down",
            "1 for a program that ended too often and stays down.",
            labels=["program"],
        )
        for program, record in read_restarts().items():
            restarts.add_metric([program], record.num_restarts)
            down.add_metric([program], float(bool(record.down)))
        yield restarts
        yield down
