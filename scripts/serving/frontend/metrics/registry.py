"""Everything that `/metrics` shows.

Names follow what other OpenAI-compatible servers export, with the prefix `serving_`.
"""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from serving.frontend.metrics.collectors import Counter, Gauge, Histogram
from serving.frontend.metrics.instances import InstanceMetrics
from serving.load_report import LoadReport
from serving.protocol import Role

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

IndexEvent = Literal["batch", "gap", "stale", "snapshot", "snapshot_failed"]
DeadlinePhase = Literal["queue", "prefill", "first_token", "token", "total"]


class Metrics:
    """All metrics of one frontend process, in their own registry.

    With several models, each model has one without figures `of_process`. One more, without those
    `of_model`, has what belongs to the process, and requests that named no model.
    """

    def __init__(self, *, of_process: bool = True, of_model: bool = True) -> None:
        # Halves the page; nobody reads creation times.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry(auto_describe=False)
        if of_process:
            ProcessCollector(registry=registry)
        self.time_to_first_token = Histogram(
            "serving_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            TTFT_BUCKETS_S,
        )
        self.inter_token_latency = Histogram(
            "serving_inter_token_latency_seconds",
            "Gap between two outputs of a sample, divided by the tokens in the later output.",
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
        self.in_flight = Gauge("serving_requests_in_flight", "Samples being generated.")
        self.queued = Gauge("serving_requests_queued", "Samples in flight that have no token yet.")
        self.prompt_tokens = Counter("serving_prompt_tokens", "Prompt tokens of finished samples.")
        self.completion_tokens = Counter("serving_completion_tokens", "Tokens generated.")
        self.cached_tokens = Counter(
            "serving_cached_tokens", "Prompt tokens whose KV was cached or fetched."
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
            "Prompt tokens whose blocks the index found on the chosen instance.",
            ["role", "instance"],
        )
        self.index_events = Counter(
            "serving_kv_index_events",
            "Event batches and snapshots that keep the prefix index up to date.",
            ["instance", "kind"],
        )
        self.deadlines_exceeded = Counter(
            "serving_deadlines_exceeded",
            "Deadlines that requests exceeded, by phase. After `queue` and `token`, the request "
            "is tried elsewhere. Late KV transfers count as serving_kv_transfer_failures.",
            ["phase"],
        )
        for phase in get_args(DeadlinePhase):
            self.deadlines_exceeded.add(0, phase)  # so that the first one shows as a rise
        self.quarantined_requests = Counter(
            "serving_quarantined_requests",
            "Requests that were ended because workers failed while they computed them.",
        )
        self._instances = InstanceMetrics()
        for collector in vars(self).values():
            is_shown = of_model or collector is self.requests
            if is_shown and isinstance(collector, Counter | Histogram | Gauge | InstanceMetrics):
                registry.register(collector)

    def add(self, collector: Collector) -> None:
        """Show the samples of `collector` too."""
        self._registry.register(collector)

    def observe_load(self, report: LoadReport) -> None:
        """Remember a worker's latest report; cheap enough for every engine step."""
        self._instances.add(report)

    def forget_instance(self, instance_id: str) -> None:
        """Its gauges disappear; its counters stay."""
        self._instances.forget(instance_id)

    def observe_routed(
        self, policy: str, role: Role, instance_id: str, prompt_tokens: int, hit_tokens: int
    ) -> None:
        """One routing decision; `hit_tokens` is the overlap found in the index."""
        self.routed_requests.add(1, policy, role, instance_id)
        self.routed_tokens.add(prompt_tokens, role, instance_id)
        self.prefix_hit_tokens.add(hit_tokens, role, instance_id)

    def observe_deadline(self, phase: str) -> None:
        """A request exceeded a deadline. `phase` may be as DeadlineExceeded names it."""
        self.deadlines_exceeded.add(1, phase.replace(" ", "_"))

    def observe_index(self, instance_id: str, kind: IndexEvent) -> None:
        """The index got an event batch or a snapshot of an instance, or failed to."""
        self.index_events.add(1, instance_id, kind)

    def render(self) -> bytes:
        """Everything, in the text format of `CONTENT_TYPE`."""
        return generate_latest(self._registry)
