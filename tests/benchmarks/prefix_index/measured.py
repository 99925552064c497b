"""Measures one index in a process of its own, which answers requests of the benchmark."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.prefix_index.systems import Dynamo, Ours
from benchmarks.prefix_index.workload import PROMPT_TOKENS, Event, Workload

SCRIPT = Path(__file__).resolve().parents[1] / "index.py"


class MeasuredSystem:
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


def serve_requests(name: str) -> None:
    measured = MeasuredSystem(Ours() if name == "ours" else Dynamo())
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(measured, request.pop("ask"))(**request)), flush=True)


class SystemProcess:
    """A process that runs `serve_requests`."""

    def __init__(self, python: Path | str, name: str) -> None:
        command = [str(python), str(SCRIPT), "--system", name]
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
def system_processes(peer: Path) -> Iterator[dict[str, SystemProcess]]:
    asked = {"ours": SystemProcess(sys.executable, "ours")}
    try:
        if peer.exists():
            asked["peer"] = SystemProcess(peer, "dynamo")
        yield asked
    finally:
        for system in asked.values():
            system.close()
