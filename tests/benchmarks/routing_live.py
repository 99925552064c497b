"""Recorded workloads against real deployments of mock workers, faster than they were recorded.

One deployment of each kind is started by `snakemake` and stays for all traces, each with its own
etcd, NATS, frontends, router and KV events; requests go to them in turns (A B A B). What the
machine can do is the limit of all this, so:

- Time runs `speedup` times as fast, for arrivals and engines. Reported times are those of the trace.
  The service itself does not run faster: a millisecond that it takes counts as `speedup`.
- Where prompts are very long, a token stands for `shrink` of theirs: then blocks have fewer tokens
  and are as many, and a worker computes fewer tokens in a second.
- The first seconds of a trace, not all of it.

Prompts are token ids, the same for the same block of the trace, which is one or several of the
engine's: those have 128 tokens at most. Each round has ids of its own,
so that it finds caches full of what nobody asks for any more, and no hits of the round before.
The simulation that stands beside it is of the same slice, with the same delays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from benchmarks.load.streaming_client import Client, Completion
from integration.deployment import Deployment
from integration.tiny_model import save_tiny_model
from msgspec import Struct
from serving.engine.core.speed import WorkerSpeed
from serving.simulate.outcome import RequestOutcome, SimulationOutcome
from serving.simulate.trace import HASH_TOKENS, Trace, TraceRequest

MODEL = "tiny"
WORKERS, BLOCKS = 8, 2000
BLOCK_SIZE = 128
MAX_MODEL_LEN = 256_000
STEP_S = 0.02
LATE_S = 120.0
_FIRST_ID, _NUM_IDS = 10, 90  # two digits each: less to send

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("serve_agg_router", {}),
    "round robin": ("serve_agg", {"router": {"policy": "round_robin"}}),
    "dynamo": ("serve_agg_router", {}),
    "sglang-like": ("serve_agg_router", {}),
    "4 frontends": ("serve_agg_router", {"frontend": {"processes": 4}}),
}
"""Name to `snakemake` target and sections of the configuration."""
PUT_IN = ("dynamo", "sglang-like")
"""Policies of others, which `peers/policy_put_in/sitecustomize.py` gives to the frontends."""


# --- the workload, scaled -------------------------------------------------------------------------


def first_seconds(trace: Trace, seconds: float) -> Trace:
    return Trace([each for each in trace.requests if each.arrival_s < seconds], trace.block_size)


class Pace(Struct, frozen=True):
    """How much of a trace is replayed, in its own time; and, see the module, in what scale."""

    first_s: float
    speedup: float
    shrink: int = 1

    def block_tokens(self) -> int:
        return HASH_TOKENS // self.shrink

    def engine_speed(self) -> WorkerSpeed:
        """20,000 tokens of the trace in a second, and 20 ms a token."""
        tokens_per_s = WorkerSpeed().prefill_tokens_per_s / self.shrink * self.speedup
        return WorkerSpeed(prefill_tokens_per_s=tokens_per_s, step_s=STEP_S / self.speedup)

    def of(self, trace: Trace) -> Trace:
        """That part of it, in that scale."""
        requests = []
        for each in first_seconds(trace, self.first_s).faster(self.speedup).requests:
            full = len(each.block_hashes)
            rest = (each.prompt_tokens - full * HASH_TOKENS) // self.shrink
            tokens = max(1, full * self.block_tokens() + rest)
            requests.append(
                TraceRequest(each.arrival_s, tokens, each.completion_tokens, each.block_hashes)
            )
        return Trace(requests, self.block_tokens())

    def engine_sections(self) -> dict[str, Any]:
        """The same speed for the mock engine, which computes prompts in chunks beside decodes.

        A step with nothing but decodes takes `STEP_S`, and one with a chunk of a block of the trace
        as long as that would take to compute, which is a little longer: so neither slows the other
        much, as in the simulation.
        """
        chunk = self.block_tokens()
        chunk_s = chunk / self.engine_speed().prefill_tokens_per_s * self.speedup
        return {
            "engine": {
                "backend": "mock",
                "dtype": "bfloat16",
                "block_size": BLOCK_SIZE,
                "max_model_len": MAX_MODEL_LEN,
                "kv_cache_tokens": BLOCKS * chunk,
                "max_batch_size": 256,
                "max_num_batched_tokens": chunk,
                "max_waiting": 4096,
            },
            "mock": {
                "step_s": STEP_S,
                "step_sequence_s": 0.0,
                "prefill_tokens_per_s": chunk / (chunk_s - STEP_S),
                "speedup": self.speedup,
            },
            "workers": {"agg": 1, "instances_per_process": WORKERS},
        }


class Prompts:
    """Token ids for blocks of a trace; others for another `salt`."""

    def __init__(self, salt: int) -> None:
        self._salt = salt
        self._blocks: dict[int, list[int]] = {}

    def token_ids(self, request: TraceRequest, number: int, block_tokens: int) -> list[int]:
        """What follows the full blocks is shared with no other request, by its `number`."""
        ids: list[int] = []
        for block_hash in request.block_hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                block = self._blocks[block_hash] = _ids(f"{self._salt} {block_hash}", block_tokens)
            ids += block
        return ids + _ids(f"{self._salt} rest {number}", request.prompt_tokens - len(ids))


def _ids(seed: str, count: int) -> list[int]:
    return [_FIRST_ID + each % _NUM_IDS for each in random.Random(seed).randbytes(count)]


# --- deployments ----------------------------------------------------------------------------------


class Live:
    """A deployment of one kind. It serves once its pace is set."""

    def __init__(self, folder: Path, model: Path, kind: str) -> None:
        self._target, more = KINDS[kind]
        self._deployment = Deployment(folder, str(model), **more)
        self._deployment.config["frontend"]["max_inflight"] = 4096
        self._put_in = kind if kind in PUT_IN else None
        self.client = Client(self._deployment.config["frontend"]["port"], MODEL)

    def run_at(self, pace: Pace) -> None:
        """Start it; or its workers again, when they ran at another pace."""
        deployment = self._deployment
        deployment.config |= pace.engine_sections()
        if self._put_in:
            deployment.environment = {
                "PYTHONPATH": str(Path(__file__).parent / "peers" / "policy_put_in"),
                "ROUTING_POLICY": self._put_in,
                "ROUTING_TREE_BLOCKS": str(BLOCKS * pace.block_tokens() // BLOCK_SIZE),
            }
            deployment.snakemake("stop")  # a frontend that runs has the size of another pace
        deployment.snakemake(self._target)
        deployment.wait(
            f"{WORKERS} workers",
            lambda state: state["ready"] and len(state["instances"]) == WORKERS,
        )

    def stop(self) -> None:
        self._deployment.stop()

    def cpu_s(self, name: str) -> float:
        """Of the programs whose name begins so, and all below them."""
        return sum(
            cpu_s(psutil.Process(pid))
            for program, pid in self._deployment.pids().items()
            if program.startswith(name)
        )


@contextlib.contextmanager
def deployments(folder: Path, kinds: list[str]) -> Iterator[dict[str, Live]]:
    """One of each kind. They are stopped however this ends."""
    with contextlib.redirect_stdout(sys.stderr):
        model = save_tiny_model(folder / "tiny")
    config = model / "config.json"
    told = json.loads(config.read_text()) | {"max_position_embeddings": MAX_MODEL_LEN}
    config.write_text(json.dumps(told))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        found = {kind: Live(folder / kind.replace(" ", "-"), model, kind) for kind in kinds}
        for each in found.values():
            stack.callback(each.stop)
        yield found
        say("stopping")


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack too."""

    def end(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit("terminated")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process and all below it."""
    found = [process, *process.children(recursive=True)]
    return sum(sum(each.cpu_times()[:2]) for each in found)


# --- one replay -----------------------------------------------------------------------------------


class Replay(Struct):
    """What came of it, in time of the trace; CPU as shares of one core, of the machine's: of all."""

    outcome: SimulationOutcome
    cpu_frontend: float
    cpu_workers: float
    cpu_client: float
    cpu_machine: float
    late_p99_ms: float
    """How late requests were sent, in real time."""

    def costs(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "outcome"}


async def replay(live: Live, trace: Trace, salt: int, speedup: float) -> Replay:
    """Send a scaled trace. Raises RuntimeError when a request fails."""
    prompts = Prompts(salt)
    requests = [
        live.client.encode(
            prompts.token_ids(each, number, trace.block_size), each.completion_tokens
        )
        for number, each in enumerate(trace.requests)
    ]

    def used_s() -> list[float]:
        return [live.cpu_s("frontend"), live.cpu_s("worker-"), cpu_s(psutil.Process())]

    psutil.cpu_percent()
    before = used_s()
    began, told = time.perf_counter(), 0.0
    sent: list[Completion] = []
    late_s: list[float] = []
    for number, (each, request) in enumerate(zip(trace.requests, requests, strict=True)):
        due = began + each.arrival_s
        if (wait_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait_s)
        late_s.append(time.perf_counter() - due)
        sent.append(await live.client.send(request))
        if each.arrival_s > told + 10:
            told = each.arrival_s
            open_ones = sum(not one.ended.is_set() for one in sent)
            say(f"  {number + 1} of {len(requests)} requests sent, {open_ones} open")
    wall_s = time.perf_counter() - began
    after = used_s()
    machine = psutil.cpu_percent() / 100
    async with asyncio.timeout(LATE_S):
        for one in sent:
            await one.ended.wait()
    if errors := [one.error for one in sent if one.error]:
        raise RuntimeError(f"{len(errors)} of {len(sent)} requests failed: {errors[0]}")
    outcomes = [
        RequestOutcome(
            each.prompt_tokens, one.num_cached, 0, (one.times[0] - one.sent) * speedup, 0.0
        )
        for each, one in zip(trace.requests, sent, strict=True)
    ]
    shares = [(new - old) / wall_s for new, old in zip(after, before, strict=True)]
    late = sorted(late_s)[int(len(late_s) * 0.99)]
    return Replay(SimulationOutcome(outcomes, {}), *shares, machine, late * 1000)


def median_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}


def say(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)
