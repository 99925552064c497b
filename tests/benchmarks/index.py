"""The prefix index, block hashing and the routing decision, against NVIDIA Dynamo's index.

    python tests/benchmarks/index.py [--peer PYTHON] [--blocks N] [--workers N] [--quick]

`--peer` is the Python of the environment that `envs/dynamo.txt` describes; without it, our own
figures are printed alone. Each system lives in a process of its own and gets its requests in turns
(A B A B). Both get the same events, encoded as they arrive from the network (msgpack here, JSON
there), and the same prompts: a chain that is known for three quarters, its hashes just made, as
after hashing a prompt. 70% of the blocks are in chains that share a prefix of 32 blocks with
others, on up to 4 workers. Prints one JSON object a line, times in microseconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from benchmarks.prefix_index.measured import (  # noqa: E402
    SystemProcess,
    serve_requests,
    system_processes,
    timed,
)
from benchmarks.prefix_index.workload import BLOCK_TOKENS, PROMPT_TOKENS, Workload  # noqa: E402

PEER = ROOT / "results" / "peers" / "dynamo" / "bin" / "python"
LENGTHS = (64, 256, 512)
DECISION_TOKENS, DECISION_WORKERS, DECISION_BLOCK = 8192, 64, 16


def in_turns(
    systems: dict[str, SystemProcess], rounds: int, ask: str, **arguments: Any
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        seeded = {**arguments, "seed": number} if ask.startswith("find") else arguments
        for name, system in systems.items():
            times[name] += system(ask, **seeded)
    return times


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def print_row(
    row: str, ours: float, peer: float | None, goal: float | None = None, **more: Any
) -> None:
    fields: dict[str, Any] = {"name": row, "ours": round(ours, 3)}
    if peer is not None:
        fields |= {"peer": round(peer, 3), "ratio": round(ours / peer, 3)}
    if goal is not None:
        fields["goal"] = goal
    print(json.dumps(fields | more), flush=True)


def print_times(
    row: str, times: dict[str, list[float]], goal: float | None = None, **more: Any
) -> None:
    middle = {name: statistics.median(values) for name, values in times.items()}
    p99 = {f"{name}_p99": round(percentile(values, 0.99), 1) for name, values in times.items()}
    print_row(row, middle["ours"], middle.get("peer"), goal, **p99, **more)


def routing_decision(count: int) -> tuple[list[float], list[float]]:
    """Tokens to instance with the production router; half of each prompt is cached somewhere.

    Returns elapsed and CPU times: other programs on the machine show in the first only.
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    from serving.config import RouterConfig
    from serving.kv_router.router import KvRouter
    from serving.load_report import LoadReport
    from serving.protocol import BlocksStored, InstanceInfo, KvEventBatch, ModelCard

    rng = random.Random(3)
    router = KvRouter(RouterConfig(), rng=rng)
    card = ModelCard("m", "", 131_072, DECISION_BLOCK, "salt", "", 0)
    names = [f"w{number}" for number in range(DECISION_WORKERS)]
    sequence = dict.fromkeys(names, 0)

    def store(name: str, parent: int | None, hashes: list[int]) -> None:
        sequence[name] += 1
        router.on_kv(KvEventBatch(name, 1, sequence[name], [BlocksStored(parent, hashes)]))

    for name in names:
        router.add_instance(InstanceInfo(name, 1, "agg", [], "", card, 20_000, 64, 1, "h"))
    for worker, parent, hashes in Workload(1_000_000, DECISION_WORKERS).events():
        store(names[worker], parent, hashes)
    system = [rng.randrange(150_000) for _ in range(1024)]
    prompts = []
    for _ in range(200):
        middle = [rng.randrange(150_000) for _ in range(DECISION_TOKENS // 2 - len(system))]
        known = router.hash(system + middle).block_hashes
        for name in rng.sample(names, 3):
            store(name, None, known)
        rest = [rng.randrange(150_000) for _ in range(DECISION_TOKENS // 2)]
        prompts.append(system + middle + rest)
    for name in names:
        store(name, None, router.hash(system).block_hashes)

    def report() -> None:
        for name in names:
            router.on_load(LoadReport(name, 1, 8, 2, rng.randrange(9000), 4000, 9000, 20_000))

    def decide(tokens: list[int]) -> None:
        with router.route(tokens, "agg", request_id="r"):
            pass

    elapsed, cpu = [], []
    for number in range(count):
        if number % 10 == 0:  # at 500 requests/s, every 20 ms
            report()
        started = time.thread_time()
        elapsed.append(timed(decide, prompts[number % len(prompts)]))
        cpu.append((time.thread_time() - started) * 1e6)
    return elapsed, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, default=PEER, help="Python that has Dynamo")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks and repeats")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        serve_requests(args.system)
        return
    blocks, rounds, each = (args.blocks // 10, 4, 50) if args.quick else (args.blocks, 20, 100)
    if not args.peer.exists():
        print(f"no peer: {args.peer} does not exist; see envs/dynamo.txt", file=sys.stderr)
    with system_processes(args.peer) as systems:
        stored = {
            name: system("load", blocks=blocks, workers=args.workers)
            for name, system in systems.items()
        }
        ours, peer = stored["ours"], stored.get("peer")
        wrong = {f"{name}_wrong": system("wrong", count=200) for name, system in systems.items()}
        about = {"blocks": ours["blocks"], "workers": args.workers}
        for length in LENGTHS:
            times = in_turns(systems, rounds, "find", length=length, count=each)
            cpu = in_turns(systems, rounds, "find_cpu", length=length, count=each)
            used = {f"{name}_cpu": round(statistics.median(cpu[name]), 1) for name in systems}
            goal = 0.5 if length == 512 else None
            print_times(f"find {length}", times, goal, **used, **about, **wrong)
        print_row("bytes a block", ours["bytes"], peer and peer["bytes"], 1.5, **about)
        print_row(
            "store", ours["store_cpu"], peer and peer["store_cpu"], unit="CPU µs a block", **about
        )
        hashed = in_turns(systems, rounds, "hash", count=each // 5)
        print_times(f"hash {PROMPT_TOKENS // BLOCK_TOKENS}", hashed, 1.0)
        from_array = systems["ours"]("hash", count=each, kind="array")
        print_row("hash 512 from a numpy array", statistics.median(from_array), None)
        removed = {name: system("remove") for name, system in systems.items()}
        print_row("remove", removed["ours"], removed.get("peer"), unit="CPU µs a block")
        lost = {
            name: [system("lose_worker", worker=n) for n in range(9)]
            for name, system in systems.items()
        }
        print_times("lose a worker", lost)
    decision, cpu = routing_decision(200 if args.quick else 2000)
    print_row(
        "routing decision 64 workers 8k",
        statistics.median(decision),
        None,
        p99=round(percentile(decision, 0.99), 1),
        cpu=round(statistics.median(cpu), 1),
        cpu_p99=round(percentile(cpu, 0.99), 1),
        goal_p99=1000,
    )


if __name__ == "__main__":
    main()
