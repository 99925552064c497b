"""Routing policies on recorded workloads, in virtual time, with the routers that serve.

    python tests/benchmarks/routing.py [--traces FOLDER] [--quick] [--live | --simulated]
        [--trace conversation | agentic] [--kinds ours,"4 frontends"] [--rounds N]

Eight workers, 20,000 tokens/s of prefill and 20 ms a token each, 2,000 blocks of 512 tokens. Ours is
the product's router as configured by default; the others are in `routing_policies.py`. All get the
same events and load reports, equally late. Prints one JSON object a line: times in seconds, `hit` as the share of
prompt tokens that were cached.

Then the same live (`routing_live.py`): real deployments of mock workers replay the first minutes of
each trace, sped up, and the simulation of just that stands beside each. The frontends are the
product's with another policy put into them. `cpu_...` are shares of a
core, `cpu_machine` of all: near 1, the machine is what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import msgspec  # noqa: E402
from benchmarks import routing_live as live  # noqa: E402
from benchmarks.peers.routing_policies import OTHERS, MakeSelect  # noqa: E402
from serving.config import RouterConfig  # noqa: E402
from serving.kv_router.router import KvRouter  # noqa: E402
from serving.simulate.clock import Clock  # noqa: E402
from serving.simulate.cluster import ClusterShape, MakeRouter, make_router, simulate  # noqa: E402
from serving.simulate.outcome import SimulationOutcome  # noqa: E402
from serving.simulate.trace import Trace, load_trace  # noqa: E402

WORKERS, BLOCKS = 8, 2000
HOUR_S = 3600.0
TRACES = {
    "conversation": "mooncake_conversation_first_half.jsonl",
    "agentic": "agentic_dev.jsonl",
}
LIVE = {
    "conversation": live.Pace(first_s=72.0, speedup=2.0),
    "agentic": live.Pace(first_s=900.0, speedup=5.0, shrink=4),
}
"""Requests of the one come in bursts and find the machine busy; those of the other are few, and
their prompts a hundred thousand tokens long."""
SYNTHETIC = "mooncake_synthetic_trace.jsonl"


# --- other routers --------------------------------------------------------------------------------


def with_select(make_select: MakeSelect) -> MakeRouter:
    def make(config: RouterConfig, rng: Random, clock: Clock) -> KvRouter:
        return KvRouter(config, rng=rng, clock=clock, select=make_select(rng))

    return make


POLICIES: dict[str, MakeRouter] = {
    "ours": make_router,
    **{name: with_select(make_select) for name, make_select in OTHERS.items()},
}


# --- rows -----------------------------------------------------------------------------------------


def figures(outcome: SimulationOutcome) -> dict[str, float]:
    times = {f"ttft_p{p}": round(outcome.ttft_s(p / 100), 3) for p in (50, 90, 99)}
    return {**times, "hit": round(outcome.hit_rate, 4)}


def print_row(row: str, **fields: Any) -> None:
    print(json.dumps({"name": row, **fields}), flush=True)


def shape(**more: Any) -> ClusterShape:
    return ClusterShape(num_blocks=BLOCKS, agg=WORKERS, **more)


def compare_policies(name: str, trace: Trace) -> None:
    results = {
        policy: figures(simulate(trace, shape(), RouterConfig(), make_router=make))
        for policy, make in POLICIES.items()
    }
    ours = results["ours"]
    for policy, each in results.items():
        more: dict[str, Any] = {}
        if policy != "ours":
            for key in ("ttft_p90", "ttft_p99"):
                more[f"{key}_ratio"] = round(ours[key] / each[key], 3)
            more["goal"] = "ratios below 1"
        print_row(f"{name}: {policy}", requests=len(trace.requests), **each, **more)
    best = max(each["hit"] for each in results.values())
    print_row(f"{name}: hit rate against the best", ratio=round(ours["hit"] / best, 3), goal=0.9)


def compare_frontends(name: str, trace: Trace) -> None:
    one = figures(simulate(trace, shape(), RouterConfig()))
    four = figures(simulate(trace, shape(frontends=4), RouterConfig()))
    alone = figures(simulate(trace, shape(frontends=4, share=False), RouterConfig()))
    ratio = round(four["ttft_p90"] / one["ttft_p90"], 3)
    print_row(f"{name}: 4 frontends", **four, one_ttft_p90=one["ttft_p90"], ratio=ratio, goal=1.1)
    ratio = round(alone["ttft_p90"] / one["ttft_p90"], 3)
    print_row(f"{name}: 4 frontends that share nothing", **alone, ratio=ratio)


def shuffle_bursts(name: str, whole: Trace, pace: live.Pace) -> None:
    """What the order of requests within 5 ms alone does to the slice that is replayed live: one
    frontend, 30 orders. Live, several frontends decide in another order than one."""
    trace, found = pace.of(whole), []
    for seed in range(30):
        rng = Random(seed)
        requests = [
            msgspec.structs.replace(each, arrival_s=each.arrival_s + rng.random() * 0.005)
            for each in trace.requests
        ]
        requests.sort(key=lambda each: each.arrival_s)
        shuffled = Trace(requests, trace.block_size)
        outcome = simulate(shuffled, shape(speed=pace.engine_speed()), RouterConfig())
        found.append(outcome.ttft_s(0.9) * pace.speedup)
    middle = statistics.median(found)
    spread = [round(each / middle, 3) for each in (min(found), max(found))]
    print_row(f"{name}: order within 5 ms", ttft_p90=round(middle, 3), of_median=spread)


def an_hour_of(trace: Trace) -> Trace:
    """The trace again and again, each time with other content, for an hour."""
    requests, start_s, number = [], 0.0, 0
    while start_s < HOUR_S:
        mask = number * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        for each in trace.requests:
            if start_s + each.arrival_s <= HOUR_S:
                hashes = [block_hash ^ mask for block_hash in each.block_hashes]
                requests.append(
                    msgspec.structs.replace(
                        each, arrival_s=start_s + each.arrival_s, block_hashes=hashes
                    )
                )
        start_s, number = start_s + trace.duration_s + 1, number + 1
    return Trace(requests, trace.block_size)


def endure(name: str, trace: Trace, max_blocks: int) -> None:
    """An hour with an index that has room for so many blocks, while workers hold up to 16,000."""
    samples: list[tuple[float, float]] = []

    def sample(now_s: float) -> None:
        if not samples or now_s - samples[-1][0] >= 60:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append((now_s, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))

    config = RouterConfig(index_max_blocks=max_blocks)
    outcome = simulate(trace, shape(), config, on_time=sample)
    settled = [megabytes for now_s, megabytes in samples if now_s >= trace.duration_s / 4]
    print_row(
        f"{name}: an hour, index of {max_blocks} blocks",
        requests=len(trace.requests),
        **figures(outcome),
        rss_mb_after_a_quarter=round(settled[0], 1),
        rss_mb_at_the_end=round(settled[-1], 1),
        ratio=round(settled[-1] / settled[0], 3),
        goal=1.05,
        claimed_wrongly=outcome.claimed_blocks,
        missing=outcome.missing_blocks,
        evicted=outcome.evicted_blocks,
    )


def go_live(
    traces: dict[str, Trace], paces: dict[str, live.Pace], kinds: list[str], rounds: int
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="bench-routing-") as folder,
        live.deployments(Path(folder), kinds) as systems,
    ):
        for name, whole in traces.items():
            replay_in_turns(name, whole, paces[name], systems, rounds)


def replay_in_turns(
    name: str, whole: Trace, pace: live.Pace, systems: dict[str, live.Live], rounds: int
) -> None:
    trace = pace.of(whole)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in systems}
    for kind, system in systems.items():
        live.say(f"{name}: starting {kind}, {pace.speedup:g} times as fast")
        system.run_at(pace)
    for number in range(rounds):
        for kind, system in systems.items():
            which = f"round {number + 1} of {rounds}"
            live.say(f"{name}: {kind}, {which}, {trace.duration_s:.0f} s and until all have ended")
            done = asyncio.run(live.replay(system, trace, number, pace.speedup))
            results[kind].append(figures(done.outcome) | done.costs())
    about = {"requests": len(trace.requests), **msgspec.structs.asdict(pace), "rounds": rounds}
    medians = {kind: live.median_of(rows) for kind, rows in results.items()}
    tell_live(name, medians, simulated_alike(trace, pace), about)


def simulated_alike(trace: Trace, pace: live.Pace) -> dict[str, dict[str, float]]:
    """Every policy on what was replayed, with times of the original."""
    speed = pace.engine_speed()
    outcomes = {
        policy: simulate(trace, shape(speed=speed), RouterConfig(), make_router=make)
        for policy, make in POLICIES.items()
    }
    outcomes["4 frontends"] = simulate(trace, shape(speed=speed, frontends=4), RouterConfig())
    for outcome in outcomes.values():
        for each in outcome.requests:
            each.ttft_s *= pace.speedup
    return {kind: figures(outcome) for kind, outcome in outcomes.items()}


def tell_live(
    name: str,
    medians: dict[str, dict[str, float]],
    simulated: dict[str, dict[str, float]],
    about: dict[str, Any],
) -> None:
    ours = medians["ours"]
    for kind, each in medians.items():
        more: dict[str, Any] = {}
        if kind in OTHERS:
            for key in ("ttft_p90", "ttft_p99"):
                more[f"{key}_ratio"] = round(ours[key] / each[key], 3)
            more["goal"] = "ratios below 1"
        if kind == "4 frontends":
            ratio = round(each["ttft_p90"] / ours["ttft_p90"], 3)
            more = {"one_ttft_p90": ours["ttft_p90"], "ratio": ratio, "goal": 1.1}
        against = {
            key: round(each[key] / value, 3) if value else None
            for key, value in simulated[kind].items()
        }
        print_row(
            f"live {name}: {kind}",
            **about,
            **each,
            **more,
            simulated=simulated[kind],
            live_over_simulated=against,
        )
    best = max(each["hit"] for each in (*medians.values(), *simulated.values()))
    print_row(
        f"live {name}: hit rate against the best, live or simulated",
        ratio=round(ours["hit"] / best, 3),
        goal=0.9,
        simulated={kind: each["hit"] for kind, each in simulated.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--quick", action="store_true", help="the first 600 requests of each")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--live", action="store_true", help="only the live runs")
    only.add_argument("--simulated", action="store_true", help="only the simulations")
    parser.add_argument("--speedup", type=float, help="of the live runs, for both traces")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of the live runs; medians are reported"
    )
    parser.add_argument("--trace", choices=TRACES, help="run only this one live")
    parser.add_argument(
        "--kinds", default=",".join(live.KINDS), help="run these live; ours always runs"
    )
    args = parser.parse_args()
    asked = {"ours", *args.kinds.split(",")}
    if unknown := asked - set(live.KINDS):
        parser.error(f"no such kinds: {', '.join(unknown)}; there are {', '.join(live.KINDS)}")
    kinds = [kind for kind in live.KINDS if kind in asked]

    def load(file: str) -> Trace | None:
        path = args.traces / file
        if not path.exists():
            print_row(file, skipped=f"{path} does not exist; --traces names the folder")
            return None
        return load_trace(path)

    def shortened(trace: Trace) -> Trace:
        return trace.part(600) if args.quick else trace

    # First, since memory that others leave behind would hide a growth.
    if not args.live and (trace := load(SYNTHETIC)):
        hour = shortened(an_hour_of(trace))
        endure("synthetic", hour, 100_000)
        endure("synthetic", hour, 8_000)
    traces = {name: trace for name, file in TRACES.items() if (trace := load(file))}
    replayed = {name: each for name, each in traces.items() if args.trace in (None, name)}
    if not args.live:
        for name, trace in traces.items():
            compare_policies(name, shortened(trace))
            compare_frontends(name, shortened(trace))
            shuffle_bursts(name, trace, LIVE[name])
    if not args.simulated and replayed:
        paces = {
            name: live.Pace(
                pace.first_s / (5 if args.quick else 1), args.speedup or pace.speedup, pace.shrink
            )
            for name, pace in LIVE.items()
        }
        go_live(replayed, paces, kinds, args.rounds)


if __name__ == "__main__":
    main()
