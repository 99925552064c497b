"""Samples of the frontend's `/metrics` while a benchmark runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping

import httpx
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

_TOTALS = {
    "serving_routed_prompt_tokens_total": "routed_tokens",
    "serving_prefix_hit_tokens_total": "hit_tokens",
}
FETCH_S = 5.0


class Sample(Struct, frozen=True):
    """Totals since the frontend's start, some of them by instance.

    `at_s` counts from the first sample. The processes of a frontend are summed.
    """

    at_s: float
    generated_tokens: float
    in_flight: float
    routed_tokens: dict[str, float]
    hit_tokens: dict[str, float]


class FrontendSampler:
    """Samples the frontend's state. Raises httpx.HTTPError if the frontend does not answer."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._client = httpx.Client(
            base_url=url, headers=dict(headers), timeout=FETCH_S, trust_env=False
        )
        self._started = time.monotonic()
        self.samples: list[Sample] = []

    def take(self) -> Sample:
        page = self._client.get("/metrics").raise_for_status().text
        self.samples.append(parse(page, time.monotonic() - self._started))
        return self.samples[-1]

    def close(self) -> None:
        self._client.close()


def parse(page: str, at_s: float) -> Sample:
    """From Prometheus' text format."""
    totals_by_name: dict[str, float] = defaultdict(float)
    by_instance: dict[str, dict[str, float]] = {field: {} for field in _TOTALS.values()}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals_by_name[sample.name] += sample.value
            if field := _TOTALS.get(sample.name):
                totals, instance = by_instance[field], sample.labels["instance"]
                totals[instance] = totals.get(instance, 0.0) + sample.value
    return Sample(
        at_s,
        generated_tokens=totals_by_name["serving_completion_tokens_total"],
        in_flight=totals_by_name["serving_requests_in_flight"],
        **by_instance,
    )


def hit_rates(first: Sample, last: Sample) -> dict[str, float]:
    """By instance: the cached share of the prompt tokens that were routed to it in between."""
    rates = {}
    for instance, total in last.routed_tokens.items():
        routed = total - first.routed_tokens.get(instance, 0.0)
        hit = last.hit_tokens.get(instance, 0.0) - first.hit_tokens.get(instance, 0.0)
        if routed > 0:
            rates[instance] = hit / routed
    return rates
