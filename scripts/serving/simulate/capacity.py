"""How many prefill and how many decode workers a workload needs.

First tokens wait for prefill workers, later tokens for decode workers. So the two numbers are
sought one after the other: first the fewest prefill workers that meet the TTFT target beside plenty
of decode workers that do not help them, then the fewest decode workers beside those. Both are then
simulated together, and the role that misses its target gets more workers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import PlanConfig, RouterConfig
from serving.engine.core.speed import WorkerSpeed
from serving.errors import OperatorError
from serving.progress import Report
from serving.simulate.cluster import ClusterShape, simulate
from serving.simulate.outcome import SimulationOutcome
from serving.simulate.trace import Trace, load_trace


class CapacityPlan(Struct, frozen=True):
    """Workers of each role and the simulated result: latencies at the quantile of the targets.

    `hit_rate`, `busy` (of prefill workers) and `local` (prefills on decode workers) are shares.
    """

    prefill: int
    decode: int
    ttft_s: float
    itl_s: float
    hit_rate: float
    busy: float
    local: float

    def line(self) -> str:
        return (
            f"{self.prefill:>7} {self.decode:>7} {self.ttft_s:>9.3f} {1000 * self.itl_s:>8.1f} "
            f"{100 * self.hit_rate:>6.1f} {100 * self.busy:>6.1f} {100 * self.local:>6.1f}"
        )


HEADING = "prefill  decode  TTFT (s) ITL (ms)  hit %  busy %  local %"


class CapacityPlanner:
    """Finds the smallest plan that meets the targets. Simulates each pair of numbers once."""

    def __init__(
        self, trace: Trace, plan: PlanConfig, router: RouterConfig, report: Report
    ) -> None:
        self._trace, self._plan, self._router, self._report = trace, plan, router, report
        self._plans: dict[tuple[int, int, bool], CapacityPlan] = {}

    def fewest(self) -> CapacityPlan:
        """The plan to use. Raises OperatorError when no plan meets the targets."""
        self._report(HEADING)
        plenty = self._plan.max_workers
        prefill = self._least(
            lambda n: self._ttft_is_met(self.simulated(n, plenty, helps=False)), "ttft_s"
        )
        decode = self._least(lambda n: self._itl_is_met(self.simulated(prefill, n)), "itl_s")
        while True:
            tried = self.simulated(prefill, decode)
            if not self._ttft_is_met(tried):
                # With few decode workers, first tokens may wait for decode workers.
                prefill, decode = self._more(prefill), self._more(decode)
            elif not self._itl_is_met(tried):
                decode = self._more(decode)
            else:
                return tried
            if self.simulated(prefill, decode) == tried:
                raise self._unattainable("itl_s" if self._ttft_is_met(tried) else "ttft_s")

    def simulated(self, prefill: int, decode: int, *, helps: bool = True) -> CapacityPlan:
        """Simulate one plan. `helps`: idle decode workers prefill, if the configuration allows it."""
        key = prefill, decode, helps
        if key not in self._plans:
            self._plans[key] = tried = self._measure(prefill, decode, helps)
            self._report(tried.line())
        return self._plans[key]

    def _more(self, number: int) -> int:
        return min(number + max(1, number // 4), self._plan.max_workers)

    def _least(self, suffices: Callable[[int], bool], target: str) -> int:
        """The smallest number that suffices, given that more workers are never worse."""
        high = 1
        while not suffices(high):
            if high == self._plan.max_workers:
                raise self._unattainable(target)
            high = min(2 * high, self._plan.max_workers)
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if suffices(middle) else (middle, high)
        return high

    def _measure(self, prefill: int, decode: int, helps: bool) -> CapacityPlan:
        plan = self._plan
        shape = ClusterShape(
            num_blocks=max(1, plan.kv_cache_tokens // self._trace.block_size),
            prefill=prefill,
            decode=decode,
            speed=WorkerSpeed.from_plan(plan),
        )
        helps = helps and self._router.local_prefill_when_idle
        router = msgspec.structs.replace(self._router, local_prefill_when_idle=helps)
        outcome = simulate(self._trace, shape, router)
        return CapacityPlan(
            prefill,
            decode,
            outcome.ttft_s(plan.quantile),
            outcome.itl_s(plan.quantile),
            outcome.hit_rate,
            _busy(outcome, self._trace.duration_s, prefill),
            sum(each.was_local for each in outcome.requests) / len(outcome.requests),
        )

    def _ttft_is_met(self, plan: CapacityPlan) -> bool:
        return plan.ttft_s <= self._plan.ttft_s

    def _itl_is_met(self, plan: CapacityPlan) -> bool:
        return plan.itl_s <= self._plan.itl_s

    def _unattainable(self, target: str) -> OperatorError:
        best = min(getattr(tried, target) for tried in self._plans.values())
        return OperatorError(
            f"no number of workers up to {self._plan.max_workers} meets `plan.{target}`: at the "
            f"{100 * self._plan.quantile:g}th percentile it is {best:.3g} s at best",
            remedy=f"raise `plan.{target}` or `plan.max_workers`, or plan with faster workers",
        )


def _busy(outcome: SimulationOutcome, duration_s: float, prefill: int) -> float:
    """Share of time that prefill workers computed."""
    busy_s = sum(each for name, each in outcome.busy_s.items() if name.startswith("prefill"))
    return busy_s / prefill / max(duration_s, 1e-9)


def propose(plan: PlanConfig, router: RouterConfig, *, report: Report) -> CapacityPlan:
    """Report the simulated plans and the numbers to configure.

    Raises OperatorError without a usable trace, or when no plan meets the targets.
    """
    if plan.trace is None:
        raise OperatorError(
            "there is no workload to plan for",
            remedy="set `plan.trace` to a recorded one: `--config plan-trace=FILE.jsonl`",
        )
    trace = load_trace(Path(plan.trace).expanduser()).part(plan.max_requests).faster(plan.speed_up)
    rate = len(trace.requests) / max(trace.duration_s, 1e-9)
    report(
        f"{len(trace.requests)} requests in {trace.duration_s:.0f} s ({rate:.2f}/s); targets at the "
        f"{100 * plan.quantile:g}th percentile: TTFT {plan.ttft_s:g} s, ITL {1000 * plan.itl_s:g} ms"
    )
    found = CapacityPlanner(trace, plan, router, report).fewest()
    report(f"\nworkers:\n  prefill: {found.prefill}\n  decode: {found.decode}")
    return found
