"""Whole deployments in virtual time: everything ends, nothing drifts, policies differ as they should."""

from random import Random

import pytest
from serving.config import PlanConfig, RouterConfig
from serving.errors import OperatorError
from serving.simulate.capacity import CapacityPlanner, propose
from serving.simulate.cluster import ClusterShape, simulate
from serving.simulate.trace import Trace, TraceRequest


def conversations(num: int, *, turns: int = 4, every_s: float = 0.3, seed: int = 1) -> Trace:
    """Each turn's prompt is the one before with 4 blocks more; all begin with the same 2."""
    rng = Random(seed)
    system = [rng.getrandbits(64) for _ in range(2)]
    requests = []
    for number in range(num):
        hashes = list(system)
        for turn in range(turns):
            hashes = hashes + [rng.getrandbits(64) for _ in range(4)]
            at_s = number * every_s + turn * 20.0 + rng.random()
            requests.append(TraceRequest(at_s, 512 * len(hashes) + 30, 40, hashes))
    return Trace(sorted(requests, key=lambda each: each.arrival_s), 512)


AGG = ClusterShape(num_blocks=400, agg=8)


@pytest.mark.parametrize(
    "shape",
    [
        AGG,
        ClusterShape(num_blocks=60, agg=3),
        ClusterShape(num_blocks=400, agg=8, frontends=4),
        ClusterShape(num_blocks=400, agg=8, frontends=4, share=False),
        ClusterShape(num_blocks=400, prefill=4, decode=3),
        ClusterShape(num_blocks=100, prefill=2, decode=2, frontends=2),
        ClusterShape(num_blocks=400, agg=512),
    ],
    ids=["agg", "tight", "4-frontends", "unshared", "disagg", "tight-disagg", "512"],
)
def test_every_request_ends_and_no_index_drifts(shape: ClusterShape) -> None:
    trace = conversations(60)
    outcome = simulate(trace, shape, RouterConfig())
    assert len(outcome.requests) == len(trace.requests)
    assert (outcome.claimed_blocks, outcome.missing_blocks) == (0, 0)
    assert min(each.ttft_s for each in outcome.requests) > 0
    assert min(each.itl_s for each in outcome.requests) > 0


def test_the_same_seed_gives_the_same_outcome() -> None:
    trace = conversations(30)
    assert simulate(trace, AGG, RouterConfig()) == simulate(trace, AGG, RouterConfig())


def test_kv_routing_finds_what_was_computed_before() -> None:
    trace = conversations(80)
    kv = simulate(trace, AGG, RouterConfig())
    blind = simulate(trace, AGG, RouterConfig(policy="round_robin"))
    assert kv.hit_rate > 0.6
    assert blind.hit_rate < 0.4
    assert kv.ttft_s(0.9) < blind.ttft_s(0.9)
    predicted = sum(each.predicted_tokens for each in kv.requests)
    assert predicted == pytest.approx(sum(each.cached_tokens for each in kv.requests), rel=0.05)


def test_a_bounded_index_claims_nothing_wrongly() -> None:
    outcome = simulate(conversations(80), AGG, RouterConfig(index_max_blocks=200))
    assert outcome.claimed_blocks == 0
    assert outcome.missing_blocks > 0
    assert outcome.evicted_blocks > 0


def bursts(num: int, size: int = 8) -> Trace:
    """All requests of a burst at the same moment, each with a prompt of its own."""
    rng = Random(2)
    requests = [
        TraceRequest(3.0 * burst, 8 * 512, 2, [rng.getrandbits(64) for _ in range(8)])
        for burst in range(num)
        for _ in range(size)
    ]
    return Trace(requests, 512)


def test_frontends_that_share_do_not_herd() -> None:
    """In a burst, four frontends are nearly as good as one, and far better than strangers."""
    trace = bursts(100)
    one = simulate(trace, AGG, RouterConfig()).ttft_s(0.9)
    sharing = ClusterShape(num_blocks=400, agg=8, frontends=4)
    strangers = ClusterShape(num_blocks=400, agg=8, frontends=4, share=False)
    assert simulate(trace, sharing, RouterConfig()).ttft_s(0.9) < 1.1 * one
    assert simulate(trace, strangers, RouterConfig()).ttft_s(0.9) > 1.3 * one


def test_idle_decode_workers_help_when_prefill_is_behind() -> None:
    trace = conversations(40, every_s=0.05)
    shape = ClusterShape(num_blocks=400, prefill=1, decode=4)
    helped = simulate(trace, shape, RouterConfig(local_prefill_when_idle=True))
    apart = simulate(trace, shape, RouterConfig())
    assert any(each.was_local for each in helped.requests)
    assert helped.ttft_s(0.9) < apart.ttft_s(0.9)


PLAN = PlanConfig(
    ttft_s=3.0,
    itl_s=0.03,
    max_workers=16,
    prefill_tokens_per_s=4000,
    step_s=0.01,
    step_per_sequence_s=0.004,
    kv_cache_tokens=400 * 512,
)


def test_a_plan_meets_its_targets_and_fewer_workers_do_not() -> None:
    trace = conversations(50, every_s=0.2)
    lines: list[str] = []
    planner = CapacityPlanner(trace, PLAN, RouterConfig(), lines.append)
    found = planner.fewest()
    assert found.ttft_s <= PLAN.ttft_s
    assert found.itl_s <= PLAN.itl_s
    assert found.prefill > 1
    fewer = planner.simulated(found.prefill - 1, PLAN.max_workers, helps=False)
    assert fewer.ttft_s > PLAN.ttft_s
    assert any(line == found.line() for line in lines)


@pytest.mark.parametrize(
    ("change", "named"), [({"ttft_s": 0.001}, "plan.ttft_s"), ({"itl_s": 0.001}, "plan.itl_s")]
)
def test_a_target_that_no_plan_meets_is_named(change, named) -> None:
    plan = PlanConfig(max_workers=4, **change)
    with pytest.raises(OperatorError, match=named):
        CapacityPlanner(conversations(10), plan, RouterConfig(), lambda line: None).fewest()


def test_a_plan_needs_a_trace(tmp_path) -> None:
    with pytest.raises(OperatorError, match="no workload"):
        propose(PlanConfig(), RouterConfig(), report=print)
    with pytest.raises(OperatorError, match="there is no trace"):
        propose(PlanConfig(trace=str(tmp_path / "x.jsonl")), RouterConfig(), report=print)
