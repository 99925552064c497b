"""What `/metrics` shows, in Prometheus' terms, and nothing about how it came about.

Names follow what other OpenAI-compatible servers export, with the prefix `serving_`. What
workers report about themselves arrives once per engine step, so it is only remembered here and
turned into samples when someone asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from msgspec import Struct
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from serving.frontend.metrics.collectors import Counter, Gauge, Histogram
from serving.protocol import LoadReport, Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

IndexEvent = Literal["batch", "gap", "stale", "snapshot", "snapshot_failed"]
DeadlinePhase = Literal["queue", "prefill", "first_token", "token", "total"]


class Metrics:
    """All metrics of one frontend, in a registry of their own."""

    def __init__(self) -> None:
        # Halves the page; nobody reads creation times.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        self.time_to_first_token = Histogram(
            "serving_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            TTFT_BUCKETS_S,
        )
        self.inter_token_latency = Histogram(
            "serving_inter_token_latency_seconds",
            "Gap between two outputs of a sequence, divided by the tokens of the later one.",
            ITL_BUCKETS_S,
        )
        self.e2e_request_latency = Histogram(
            "serving_e2e_request_latency_seconds",
            "From a request's arrival to the end of its response.",
            E2E_BUCKETS_S,
        )
        self.requests = Counter(
            "serving_requests",
            "HTTP requests for completions that ended.",
            ["endpoint", "status", "finish_reason"],
        )
        self.in_flight = Gauge("serving_requests_in_flight", "Sequences being generated.")
        self.queued = Gauge(
            "serving_requests_queued", "Sequences in flight that have no token yet."
        )
        self.prompt_tokens = Counter(
            "serving_prompt_tokens", "Prompt tokens of finished sequences."
        )
        self.completion_tokens = Counter("serving_completion_tokens", "Tokens generated.")
        self.cached_tokens = Counter(
            "serving_cached_tokens", "Prompt tokens whose KV was there already or was fetched."
        )
        self.routed_requests = Counter(
            "serving_routed_requests", "Routing decisions.", ["policy", "role", "instance"]
        )
        self.routed_tokens = Counter(
            "serving_routed_prompt_tokens",
            "Prompt tokens of routing decisions.",
            ["role", "instance"],
        )
        self.prefix_hit_tokens = Counter(
            "serving_prefix_hit_tokens",
            "Prompt tokens that the index knew to be on the chosen instance.",
            ["role", "instance"],
        )
        self.index_events = Counter(
            "serving_kv_index_events",
            "What keeps the prefix index in step with the workers.",
            ["instance", "kind"],
        )
        self.deadlines_exceeded = Counter(
            "serving_deadlines_exceeded",
            "Deadlines that requests ran past, by phase; after `queue` and `token` they are tried "
            "elsewhere. Transfers that did are among serving_kv_transfer_failures.",
            ["phase"],
        )
        for phase in get_args(DeadlinePhase):
            self.deadlines_exceeded.add(0, phase)  # so that the first one is a rise
        self._reports = _Reports()
        for collector in vars(self).values():
            if isinstance(collector, Counter | Histogram | Gauge | _Reports):
                registry.register(collector)

    def add(self, collector: Collector) -> None:
        """Show what this one collects as well."""
        self._registry.register(collector)

    def observe_load(self, report: LoadReport) -> None:
        """Remember a worker's latest report; cheap enough for every engine step."""
        self._reports.add(report)

    def forget_instance(self, instance_id: str) -> None:
        """Its gauges disappear; its counters stay."""
        self._reports.live.discard(instance_id)

    def observe_routed(
        self, policy: str, role: Role, instance_id: str, prompt_tokens: int, hit_tokens: int
    ) -> None:
        """One routing decision; `hit_tokens` is the overlap found in the index."""
        self.routed_requests.add(1, policy, role, instance_id)
        self.routed_tokens.add(prompt_tokens, role, instance_id)
        self.prefix_hit_tokens.add(hit_tokens, role, instance_id)

    def observe_deadline(self, phase: str) -> None:
        """A request ran past a deadline; `phase` as DeadlineExceeded names it, or a DeadlinePhase."""
        self.deadlines_exceeded.add(1, phase.replace(" ", "_"))

    def observe_index(self, instance_id: str, kind: IndexEvent) -> None:
        """Something happened between an instance's event stream and the index."""
        self.index_events.add(1, instance_id, kind)

    def render(self) -> bytes:
        """Everything, in the text format of `CONTENT_TYPE`."""
        return generate_latest(self._registry)


class _Totals(Struct):
    """Counters of one instance over all its epochs, as of its latest report."""

    kv_transfer_bytes: float = 0
    kv_transfers: float = 0
    kv_transfer_failures: float = 0
    kv_transfer_seconds: float = 0
    local_prefill_fallbacks: float = 0
    preemptions: float = 0
    offloaded_blocks: float = 0
    onloaded_blocks: float = 0

    def plus(self, report: LoadReport) -> _Totals:
        return _Totals(
            self.kv_transfer_bytes + report.kv_bytes_received,
            self.kv_transfers + report.kv_transfers,
            self.kv_transfer_failures + report.kv_transfer_failures,
            self.kv_transfer_seconds + report.kv_transfer_seconds,
            self.local_prefill_fallbacks + report.local_prefill_fallbacks,
            self.preemptions + report.preemptions,
            self.offloaded_blocks + report.offloaded_blocks,
            self.onloaded_blocks + report.onloaded_blocks,
        )


_TRANSFER_COUNTERS = {
    "kv_transfer_bytes": "Bytes of KV received from prefill workers.",
    "kv_transfers": "KV transfers completed.",
    "kv_transfer_failures": "KV transfers that failed.",
    "kv_transfer_seconds": "Time spent in KV transfers.",
    "local_prefill_fallbacks": "Prompts computed again because their KV could not be fetched.",
}
_ENGINE_COUNTERS = {
    "preemptions": "Requests preempted for want of blocks.",
    "offloaded_blocks": "Evicted KV blocks copied to host memory.",
    "onloaded_blocks": "KV blocks copied back from host memory for a prefix hit.",
}
_GAUGES = {
    "num_running": "Requests in the engine's batch.",
    "num_waiting": "Requests queued in the engine.",
    "queued_tokens": "Prompt tokens waiting or partly computed.",
    "active_blocks": "KV blocks held by running requests.",
    "cached_blocks": "Evictable KV blocks kept for prefix hits.",
    "num_blocks": "KV blocks in all.",
    "host_cached_blocks": "Evicted KV blocks kept in host memory.",
    "num_host_blocks": "KV blocks that host memory has room for.",
}


class _Reports(Collector):
    """The latest load report of every instance, as samples.

    A worker counts from zero in each epoch. What earlier epochs counted is kept, so that the
    counters here never fall while the frontend lives.
    """

    def __init__(self) -> None:
        self.live: set[str] = set()
        self._latest: dict[str, LoadReport] = {}
        self._before: dict[str, _Totals] = {}

    def add(self, report: LoadReport) -> None:
        instance_id = report.instance_id
        last = self._latest.get(instance_id)
        if last is not None and last.epoch != report.epoch:
            if report.epoch < last.epoch:
                return
            before = self._before.get(instance_id, _Totals())
            self._before[instance_id] = before.plus(last)
        self._latest[instance_id] = report
        self.live.add(instance_id)

    def collect(self) -> Iterable[Metric]:
        yield from self._counters()
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"serving_instance_{name}", text, labels=["instance"])
            for instance_id in sorted(self.live):
                gauge.add_metric([instance_id], getattr(self._latest[instance_id], name))
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        totals = {
            instance_id: self._before.get(instance_id, _Totals()).plus(report)
            for instance_id, report in sorted(self._latest.items())
        }
        for name, text in _TRANSFER_COUNTERS.items():
            family = CounterMetricFamily(f"serving_{name}", text, labels=["instance", "transport"])
            for instance_id, total in totals.items():
                transport = self._latest[instance_id].kv_transport
                family.add_metric([instance_id, transport], getattr(total, name))
            yield family
        for name, text in _ENGINE_COUNTERS.items():
            family = CounterMetricFamily(f"serving_{name}", text, labels=["instance"])
            for instance_id, total in totals.items():
                family.add_metric([instance_id], getattr(total, name))
            yield family
