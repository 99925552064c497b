"""The results of a simulated workload: latencies and hit rates."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct


class RequestOutcome(Struct):
    """One request. `ttft_s` from its arrival; `itl_s` the mean gap between its tokens."""

    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    ttft_s: float
    itl_s: float
    was_local: bool = False


class SimulationOutcome(Struct):
    """All requests, and the state of the indexes at the end, when every message has arrived.

    `busy_s`: time each instance spent on prompts. `claimed_blocks`: blocks that an index wrongly
    takes an instance to hold. `missing_blocks`: held blocks that an index does not know; it must
    have evicted them.
    """

    requests: list[RequestOutcome]
    busy_s: dict[str, float]
    claimed_blocks: int = 0
    missing_blocks: int = 0
    evicted_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were cached where they were computed."""
        tokens = sum(each.prompt_tokens for each in self.requests)
        return sum(each.cached_tokens for each in self.requests) / max(1, tokens)

    def ttft_s(self, share: float) -> float:
        return percentile((each.ttft_s for each in self.requests), share)

    def itl_s(self, share: float) -> float:
        return percentile((each.itl_s for each in self.requests), share)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
