"""What the instances report about themselves, as samples of `/metrics`.

Reports arrive once per engine step, so the latest is only remembered here; it becomes samples when
somebody asks. Which figures there are is defined in `serving/load_report.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.load_report import (
    CounterFigure,
    GaugeFigure,
    LoadReport,
    TransferCounterFigure,
    figures,
)


class InstanceMetrics(Collector):
    """The latest load report of every instance.

    A worker counts from zero in each epoch. The totals of earlier epochs are kept, so that the
    counters here never fall while the frontend lives.
    """

    def __init__(self, definition: type[LoadReport] = LoadReport) -> None:
        shown = figures(definition).items()
        self._counters = {name: f for name, f in shown if isinstance(f, CounterFigure)}
        self._gauges = {name: f for name, f in shown if isinstance(f, GaugeFigure)}
        self._live: set[str] = set()
        self._latest: dict[str, LoadReport] = {}
        self._before: dict[str, dict[str, float]] = {}

    def add(self, report: LoadReport) -> None:
        """Remember a report; one of an earlier epoch is ignored."""
        instance_id = report.instance_id
        last = self._latest.get(instance_id)
        if last is not None and last.epoch != report.epoch:
            if report.epoch < last.epoch:
                return
            self._before[instance_id] = self._totals(last)
        self._latest[instance_id] = report
        self._live.add(instance_id)

    def forget(self, instance_id: str) -> None:
        """Its gauges disappear; its counters stay."""
        self._live.discard(instance_id)

    def _totals(self, report: LoadReport) -> dict[str, float]:
        """All that the instance has counted in this epoch and those before it, by field."""
        before = self._before.get(report.instance_id, {})
        return {name: before.get(name, 0) + getattr(report, name) for name in self._counters}

    def collect(self) -> Iterable[Metric]:
        reports = [self._latest[instance_id] for instance_id in sorted(self._latest)]
        totals = [self._totals(report) for report in reports]
        for name, counter in self._counters.items():
            by_transport = isinstance(counter, TransferCounterFigure)
            labels = ["instance", "transport"] if by_transport else ["instance"]
            family: CounterMetricFamily | GaugeMetricFamily = CounterMetricFamily(
                f"serving_{counter.metric or name}", counter.help, labels=labels
            )
            for report, total in zip(reports, totals, strict=True):
                values = [report.instance_id, report.kv_transport][: len(labels)]
                family.add_metric(values, total[name])
            yield family
        for name, gauge in self._gauges.items():
            family = GaugeMetricFamily(
                f"serving_instance_{gauge.metric or name}", gauge.help, labels=["instance"]
            )
            for report in reports:
                if report.instance_id in self._live:
                    family.add_metric([report.instance_id], getattr(report, name))
            yield family
