"""The prefix index, block hashing and the routing decision, against NVIDIA Dynamo's index.

    python tests/benchmarks/index.py [--peer PYTHON] [--blocks N] [--workers N] [--quick]

`--peer` is the Python of the environment that `envs/dynamo.txt` describes; without it, our own
figures are printed alone. Each system lives in a process of its own and is asked in turns
(A B A B). Both get the same events, encoded as they arrive from the network (msgpack here, JSON
there), and the same prompts: a chain that is known for three quarters, its hashes just made, as
after hashing a prompt. 70% of the blocks are in chains that share a prefix of 32 blocks with
others, on up to 4 workers. Prints one JSON object a line, times in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / "results" / "peers" / "dynamo" / "bin" / "python"
LENGTHS = (64, 256, 512)
PROMPT_TOKENS, BLOCK_TOKENS = 512 * 32, 32
DECISION_TOKENS, DECISION_WORKERS, DECISION_BLOCK = 8192, 64, 16

Event = tuple[int, int | None, list[int]]  # worker, parent, block hashes


# --- the workload ---------------------------------------------------------------------------------


class Workload:
    """Chains of 64 to 512 blocks behind prefixes of 32, stored by events of 16 blocks.

    `chains`: each with the worker that has all of it, and those that have its prefix.
    """

    def __init__(self, num_blocks: int, num_workers: int) -> None:
        self._rng = random.Random(1)
        self.chains: list[tuple[array[int], int, list[int]]] = []
        self.num_blocks = 0
        self._target, self._workers = num_blocks, num_workers
        self._prefixes: list[tuple[list[int], list[int]]] = []

    def events(self) -> Iterator[Event]:
        rng = self._rng
        while self.num_blocks < self._target:
            if not self._prefixes or rng.random() < 0.1:
                prefix = self._hashes(32)
                sharers = rng.sample(range(self._workers), rng.randint(1, min(4, self._workers)))
                self._prefixes.append((prefix, sharers))
                for worker in sharers:
                    yield from self._run(worker, None, prefix)
            prefix, sharers = rng.choice(self._prefixes)
            worker, tail = rng.choice(sharers), self._hashes(rng.randint(64, 512) - 32)
            yield from self._run(worker, prefix[-1], tail)
            self.chains.append((array("Q", prefix + tail), worker, sharers))

    def _hashes(self, count: int) -> list[int]:
        return [self._rng.getrandbits(63) | 1 for _ in range(count)]

    def _run(self, worker: int, parent: int | None, hashes: list[int]) -> Iterator[Event]:
        self.num_blocks += len(hashes)
        for at in range(0, len(hashes), 16):
            yield worker, hashes[at - 1] if at else parent, hashes[at : at + 16]

    def prompts(self, length: int, count: int, seed: int) -> Iterator[list[int]]:
        """Known for three quarters; each hash a number of its own."""
        rng = random.Random(seed)
        known = length * 3 // 4
        long_enough = [chain for chain, _, _ in self.chains if len(chain) >= known]
        for _ in range(count):
            chain = rng.choice(long_enough)
            yield chain[:known].tolist() + [rng.getrandbits(63) for _ in range(length - known)]


# --- the two sides --------------------------------------------------------------------------------


class Ours:
    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT / "scripts"))
        import msgspec
        from serving import block_hash
        from serving.kv_router.prefix_index import PrefixIndex
        from serving.protocol import BlocksRemoved, BlocksStored, KvEventBatch, msgpack_encode

        self._index, self._chain = PrefixIndex(), block_hash.chain
        self._batch, self._stored, self._encode = KvEventBatch, BlocksStored, msgpack_encode
        self._removed, self._decode = BlocksRemoved, msgspec.msgpack.Decoder(KvEventBatch).decode
        self.find = self._find()

    def encoded(self, event: Event) -> bytes:
        worker, parent, hashes = event
        return self._encode(self._batch(f"w{worker}", 1, 1, [self._stored(parent, hashes)]))

    def encoded_removal(self, worker: int, hashes: list[int]) -> bytes:
        return self._encode(self._batch(f"w{worker}", 1, 1, [self._removed(hashes)]))

    def apply(self, raw: bytes) -> None:
        batch = self._decode(raw)
        for event in batch.events:
            if isinstance(event, self._stored):
                self._index.store(
                    batch.instance_id, event.block_hashes, event.parent_hash, event.tier
                )
            else:
                self._index.remove(batch.instance_id, event.block_hashes, event.tier)

    def _find(self) -> Callable[[list[int]], Any]:
        return self._index.overlap

    def found(self, hashes: list[int]) -> dict[int, int]:
        return {int(name[1:]): n for name, n in self._index.overlap(hashes).blocks.items()}

    def remove_worker(self, worker: int) -> None:
        self._index.remove_instance(f"w{worker}")

    def hash(self, tokens: Any) -> Any:
        return self._chain(tokens, BLOCK_TOKENS, 5)


class Dynamo:
    def __init__(self) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq

        self._tree, self._hash, self._number = RadixTree(), compute_block_hash_for_seq, 0
        self.find = self._tree.find_matches

    def encoded(self, event: Event) -> tuple[int, bytes]:
        worker, parent, hashes = event
        blocks = [{"block_hash": each, "tokens_hash": each} for each in hashes]
        return worker, self._event({"stored": {"parent_hash": parent, "blocks": blocks}})

    def encoded_removal(self, worker: int, hashes: list[int]) -> tuple[int, bytes]:
        return worker, self._event({"removed": {"block_hashes": hashes}})

    def _event(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        return json.dumps({"event_id": self._number, "data": data, "dp_rank": 0}).encode()

    def apply(self, raw: tuple[int, bytes]) -> None:
        self._tree.apply_event(*raw)

    def found(self, hashes: list[int]) -> dict[int, int]:
        scores = self._tree.find_matches(hashes).scores
        return {key[0] if isinstance(key, tuple) else key: n for key, n in scores.items()}

    def remove_worker(self, worker: int) -> None:
        self._tree.remove_worker(worker)

    def hash(self, tokens: Any) -> Any:
        return self._hash(tokens, BLOCK_TOKENS)


class Side:
    """Answers requests of the other process; each method returns plain JSON values."""

    def __init__(self, system: Ours | Dynamo) -> None:
        self._system = system
        self._events: list[Event] = []

    def load(self, blocks: int, workers: int) -> dict[str, float]:
        """Feed the index; microseconds and bytes of resident memory per block, events excluded."""
        system, self._workload = self._system, Workload(blocks, workers)
        encoded, recent = [], deque[Event](maxlen=2000)
        for event in self._workload.events():
            encoded.append(system.encoded(event))
            recent.append(event)
        self._events = list(recent)
        system.find([1, 2, 3])
        before, started, cpu = resident_bytes(), time.perf_counter(), time.process_time()
        for raw in encoded:
            system.apply(raw)  # type: ignore[arg-type]
        system.find([1, 2, 3])  # Whoever works in the background has finished now.
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        size = resident_bytes() - before
        num_blocks = self._workload.num_blocks
        return {
            "blocks": num_blocks,
            "store": took / num_blocks * 1e6,
            "store_cpu": cpu / num_blocks * 1e6,
            "bytes": size / num_blocks,
        }

    def wrong(self, count: int) -> int:
        """Prompts whose owner is not found in full, or whose prefix is not found where it is."""
        rng, wrong = random.Random(2), 0
        for chain, owner, sharers in rng.sample(self._workload.chains, count):
            found = self._system.found(chain.tolist())
            wrong += found != {worker: 32 for worker in sharers} | {owner: len(chain)}
        return wrong

    def find_cpu(self, length: int, count: int, seed: int) -> list[float]:
        """CPU time of this process, background threads included, for each of them."""
        prompts = list(self._workload.prompts(length, count, seed))
        started = time.process_time()
        for prompt in prompts:
            self._system.find(prompt)
        return [(time.process_time() - started) / count * 1e6]

    def find(self, length: int, count: int, seed: int) -> list[float]:
        find, times = self._system.find, []
        for prompt in self._workload.prompts(length, count, seed):
            started = time.perf_counter()
            find(prompt)
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def hash(self, count: int, kind: str = "list") -> list[float]:
        ids = [token * 7919 % 150_000 for token in range(PROMPT_TOKENS)]
        tokens = array("I", ids) if kind == "array" else ids
        if kind == "array":
            import numpy as np

            tokens = np.array(tokens, dtype=np.uint32)
        return [timed(self._system.hash, tokens) for _ in range(count)]

    def remove(self) -> float:
        """Leaves first, as engines evict; CPU microseconds a block."""
        removals = [(worker, hashes[::-1]) for worker, _, hashes in reversed(self._events)]
        encoded = [self._system.encoded_removal(*each) for each in removals]
        started = time.process_time()
        for raw in encoded:
            self._system.apply(raw)  # type: ignore[arg-type]
        self._system.find([1, 2, 3])
        took = time.process_time() - started
        return took / sum(len(hashes) for _, hashes in removals) * 1e6

    def lose_worker(self, worker: int) -> float:
        return timed(self._system.remove_worker, worker)


def timed(call: Callable[[Any], Any], argument: Any) -> float:
    started = time.perf_counter()
    call(argument)
    return (time.perf_counter() - started) * 1e6


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def answer_forever(name: str) -> None:
    side = Side(Ours() if name == "ours" else Dynamo())
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(getattr(side, question.pop("ask"))(**question)), flush=True)


class Asked:
    """The other end of `answer_forever`."""

    def __init__(self, python: Path | str, name: str) -> None:
        command = [str(python), str(Path(__file__)), "--side", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, ask: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ask": ask, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that was asked to {ask} ended")
        return json.loads(line)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def sides(peer: Path) -> Iterator[dict[str, Asked]]:
    asked = {"ours": Asked(sys.executable, "ours")}
    try:
        if peer.exists():
            asked["peer"] = Asked(peer, "dynamo")
        yield asked
    finally:
        for side in asked.values():
            side.close()


# --- rows -----------------------------------------------------------------------------------------


def in_turns(
    asked: dict[str, Asked], rounds: int, ask: str, **arguments: Any
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(rounds):
        seeded = {**arguments, "seed": number} if ask.startswith("find") else arguments
        for name, side in asked.items():
            times[name] += side(ask, **seeded)
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
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        answer_forever(args.side)
        return
    blocks, rounds, each = (args.blocks // 10, 4, 50) if args.quick else (args.blocks, 20, 100)
    if not args.peer.exists():
        print(f"no peer: {args.peer} does not exist; see envs/dynamo.txt", file=sys.stderr)
    with sides(args.peer) as asked:
        stored = {
            name: side("load", blocks=blocks, workers=args.workers) for name, side in asked.items()
        }
        ours, peer = stored["ours"], stored.get("peer")
        wrong = {f"{name}_wrong": side("wrong", count=200) for name, side in asked.items()}
        about = {"blocks": ours["blocks"], "workers": args.workers}
        for length in LENGTHS:
            times = in_turns(asked, rounds, "find", length=length, count=each)
            cpu = in_turns(asked, rounds, "find_cpu", length=length, count=each)
            used = {f"{name}_cpu": round(statistics.median(cpu[name]), 1) for name in asked}
            goal = 0.5 if length == 512 else None
            print_times(f"find {length}", times, goal, **used, **about, **wrong)
        print_row("bytes a block", ours["bytes"], peer and peer["bytes"], 1.5, **about)
        print_row(
            "store", ours["store_cpu"], peer and peer["store_cpu"], unit="CPU µs a block", **about
        )
        hashed = in_turns(asked, rounds, "hash", count=each // 5)
        print_times(f"hash {PROMPT_TOKENS // BLOCK_TOKENS}", hashed, 1.0)
        from_array = asked["ours"]("hash", count=each, kind="array")
        print_row("hash 512 from a numpy array", statistics.median(from_array), None)
        removed = {name: side("remove") for name, side in asked.items()}
        print_row("remove", removed["ours"], removed.get("peer"), unit="CPU µs a block")
        lost = {
            name: [side("lose_worker", worker=n) for n in range(9)] for name, side in asked.items()
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
