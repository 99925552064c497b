"""The cost of the frontend, against NVIDIA Dynamo's and the routers of SGLang's family.

    python tests/benchmarks/frontend.py [--peers FOLDER] [--rounds N] [--quick]

Ours and Dynamo's frontend, both routing by KV, stand before four mock workers that take no time,
with etcd, NATS and the worker connections that each of them has in service. The same client asks
both for the same, in turns (A B A B). Frontends run on one core, everything else on the others.
CPU time is that of the frontend's processes, user and system, from /proc. `FOLDER/dynamo`,
`FOLDER/sglang_router` and `FOLDER/smg` are the environments of `envs/dynamo.txt` and
`envs/routers.txt`; without one its rows are left out. Prints one JSON object a line: medians of the
rounds, `events` those that one token made at the client.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import uvloop  # noqa: E402
from benchmarks.load.http_load import WORDS, Result, Shape, load, load_alone, tool  # noqa: E402
from benchmarks.load.running_service import RunningService  # noqa: E402
from benchmarks.peers.dummy_backend import MODEL  # noqa: E402
from benchmarks.peers.frontend_peers import Serving, backends, dynamo, router  # noqa: E402
from integration.tiny_model import save_tiny_model  # noqa: E402
from serving.config import EngineConfig, ModelConfig  # noqa: E402
from serving.deploy.model.prepare import fetch_model  # noqa: E402
from serving.deploy.security.secret_files import RPC_SECRET_FILE  # noqa: E402
from serving.engine.torch.build import build_engine  # noqa: E402
from serving.protocol import (  # noqa: E402
    EngineRequest,
    InstanceInfo,
    ModelCard,
    SamplingParams,
)
from serving.rpc import RpcClient  # noqa: E402

CONNECTIONS, TOKENS = 64, 128
SHORT = Shape(1, num_words=8, stream=False)
ROUTERS = {
    "sglang_router": ["sglang_router.launch_router"],
    "smg": ["smg", "launch"],
}
_TICKS = os.sysconf("SC_CLK_TCK")


def invented_words() -> list[str]:
    """To train a tokenizer on: Dynamo's mock workers answer with ids from 1000 to 2000, which must
    be text, or there would be nothing to stream."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(20000)]
    return [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]


# --- processes ------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process and those below it."""
    ticks = 0
    for each in family(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def pin(pid: int, cores: set[int]) -> None:
    """All threads that there are now; those to come inherit it."""
    for each in family(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)


@contextlib.contextmanager
def ours(
    model: Path, folder: Path, num_workers: int, max_model_len: int = 1024
) -> Iterator[Serving]:
    folder.mkdir(parents=True)
    manifest = fetch_model(
        ModelConfig(id=str(model)), folder / "model", weights="dummy", report=lambda _: None
    )
    engine = EngineConfig(backend="mock", device="cpu", dtype="float32", weights="dummy")
    build_engine(
        manifest, folder / "engine", engine=engine, fingerprint="benchmark", report=lambda _: None
    )
    sections = {
        "model": {"id": str(model), "name": MODEL},
        "engine": {
            "backend": "mock",
            "max_model_len": max_model_len,
            "block_size": 16,
            "kv_cache_tokens": 262144,
            "max_batch_size": 256,
        },
        "mock": {"zero_delay": True},
        "workers": {"agg": 1, "instances_per_process": num_workers},
    }
    service = RunningService(
        folder / "service",
        folder / "engine",
        "agg_router",
        sections,
        device="cpu",
        dtype="float32",
        gpus=[],
        num_instances=num_workers,
    )
    with service:
        row = next(r for r in service.ready()["instances"] if r["instance_id"] == "agg-0")
        card = ModelCard(MODEL, "", max_model_len, 16, "", "", 0)
        address = f"unix:{folder}/service/run/worker-agg-0.sock"
        worker = InstanceInfo("agg-0", row["epoch"], "agg", [address], "", card, 1, 1, 1, "")
        secret = (folder / "service" / RPC_SECRET_FILE).read_bytes()
        yield Serving(service.port, MODEL, service.pids()["frontend"], worker, secret)


# --- rows -----------------------------------------------------------------------------------------


class Measured:
    """Values of one system, one a round."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.values[name])


def in_turns(
    systems: dict[str, Serving], rounds: int, shape: Shape, connections: int, num_requests: int
) -> dict[str, Measured]:
    """One warm-up each, then the same load on one system after the other.

    No `connections`: one after the other, each request on a connection of its own.
    """
    measured = {name: Measured() for name in systems}
    for number in range(rounds + 1):
        for name, system in systems.items():
            before = cpu_s(system.pid)
            count = num_requests if number else max(connections, num_requests // 4)
            about = (system.port, system.model, shape)
            if connections:
                work = load(*about, connections=connections, num_requests=count)
            else:
                work = load_alone(*about, num_requests=count)
            result = uvloop.run(work)
            if number:
                measured[name].add(**figures(result, shape, cpu_s(system.pid) - before))
    return measured


def figures(result: Result, shape: Shape, cpu: float) -> dict[str, float]:
    """CPU in µs, latencies in ms."""
    num_tokens = result.num_requests * shape.num_tokens
    return {
        "cpu_request": cpu / result.num_requests * 1e6,
        "cpu_token": cpu / num_tokens * 1e6,
        "requests_per_s": result.num_requests / result.wall_s,
        "tokens_per_s": num_tokens / result.wall_s,
        "events": result.num_events / num_tokens,
        "first_p50": percentile(result.first_s, 0.5) * 1e3,
        "first_p99": percentile(result.first_s, 0.99) * 1e3,
        "whole_p50": percentile(result.whole_s, 0.5) * 1e3,
    }


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def print_row(row: str, measured: dict[str, Measured], key: str, goal: float, *more: str) -> None:
    fields: dict[str, Any] = {"name": row, "ours": round(measured["ours"][key], 3)}
    peers = {name: each for name, each in measured.items() if name != "ours"}
    for name, each in peers.items():
        fields[name] = round(each[key], 3)
    if peers:
        best = min(each[key] for each in peers.values())
        fields |= {"ratio": round(measured["ours"][key] / best, 3), "goal": goal}
    for other in more:
        fields[other] = {name: round(each[other], 2) for name, each in measured.items()}
    print(json.dumps(fields), flush=True)


def skipped(row: str, why: str) -> None:
    print(json.dumps({"name": row, "skipped": why}), flush=True)


def against_dynamo(args: argparse.Namespace, model: Path, folder: Path, core: set[int]) -> None:
    python = args.peers / "dynamo" / "bin" / "python"
    with contextlib.ExitStack() as stack:
        systems = {"ours": stack.enter_context(ours(model, folder / "ours", 4))}
        if python.exists():
            systems["dynamo"] = stack.enter_context(dynamo(python, model, folder / "dynamo", 4))
        else:
            skipped("dynamo", f"{python} does not exist; see envs/dynamo.txt")
        for system in systems.values():
            pin(system.pid, core)
        scale = 4 if args.quick else 1
        requests, streams, singles = 4000 // scale, 512 // scale, 300 // scale
        for name, stream in (("cpu per request", True), ("cpu per request, not streamed", False)):
            measured = in_turns(
                systems, args.rounds, Shape(1, stream=stream), CONNECTIONS, requests
            )
            print_row(name, measured, "cpu_request", 1.0, "requests_per_s")
        measured = in_turns(systems, args.rounds, Shape(TOKENS), CONNECTIONS, streams)
        print_row("cpu per token", measured, "cpu_token", 1.0, "tokens_per_s", "events")
        measured = in_turns(systems, args.rounds, Shape(8), 0, singles)
        print_row("first token p50", measured, "first_p50", 1.0)
        print_row("first token p99", measured, "first_p99", 0.5)
        measured = in_turns(systems, args.rounds, Shape(8), 1, singles)
        print_row("first token, kept connection", measured, "first_p50", 1.0, "first_p99")


def with_tools(args: argparse.Namespace, model: Path, folder: Path, core: set[int]) -> None:
    """CPU of a request with ten tools, over that of the same request without them, in turns."""
    requests = 500 if args.quick else 2000
    with ours(model, folder / "ours", 4, max_model_len=16384) as system:
        pin(system.pid, core)
        for label, tool_bytes in (("2 KB in all", 205), ("2 KB each", 2048)):
            shapes = {"without": Shape(1), "with": Shape(1, num_tools=10, tool_bytes=tool_bytes)}
            costs: dict[str, list[float]] = {name: [] for name in shapes}
            for _ in range(args.rounds + 1):
                for name, shape in shapes.items():
                    measured = in_turns({"ours": system}, 1, shape, CONNECTIONS, requests)
                    costs[name].append(measured["ours"]["cpu_request"])
            medians = {name: statistics.median(each[1:]) for name, each in costs.items()}
            row = {name: round(each, 1) for name, each in medians.items()}
            ratio = round(medians["with"] / medians["without"], 3)
            name = f"cpu per request with ten tools, {label}"
            print(json.dumps({"name": name, **row, "ratio": ratio, "goal": 1.5}), flush=True)


async def worker_alone(worker: InstanceInfo, secret: bytes, num_requests: int) -> float:
    """Median milliseconds of one token from one of our workers, with no frontend between."""
    client = RpcClient(worker, secret=secret)
    await client.connect()
    times = []
    for number in range(num_requests):
        prompt = [3 + (number + place) % 1000 for place in range(SHORT.num_words)]
        asked = EngineRequest(f"r{number}", prompt, len(prompt), SamplingParams(max_tokens=1))
        began = perf_counter()
        async with client.generate(asked) as outputs:
            async for _ in outputs:
                times.append(perf_counter() - began)
    await client.close()
    return percentile(times, 0.5) * 1e3


def against_routers(args: argparse.Namespace, model: Path, folder: Path, core: set[int]) -> None:
    """Milliseconds beyond what a worker takes by itself, at one connection: theirs is asked over
    HTTP and ours over its own connection. Prompts are short, since routers read none."""
    with contextlib.ExitStack() as stack:
        dummies = stack.enter_context(backends(folder / "backends", 2))
        systems = {"ours": stack.enter_context(ours(model, folder / "ours", 2))}
        for name, module in ROUTERS.items():
            python = args.peers / name / "bin" / "python"
            if not python.exists():
                skipped(name, f"{python} does not exist; see envs/routers.txt")
                continue
            ports = [each.port for each in dummies]
            systems[name] = stack.enter_context(router(python, module, folder / name, ports))
        for system in systems.values():
            pin(system.pid, core)
        singles = 200 if args.quick else 1000
        measured = in_turns({"direct": dummies[0], **systems}, args.rounds, SHORT, 1, singles)
        theirs = measured.pop("direct")["whole_p50"]
        assert systems["ours"].worker is not None
        own = uvloop.run(worker_alone(systems["ours"].worker, systems["ours"].secret, singles))
        for name, each in measured.items():
            each.add(added=each["whole_p50"] - (own if name == "ours" else theirs))
        print_row("added latency", measured, "added", 1.5, "whole_p50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=ROOT / "results" / "peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    args = parser.parse_args()
    args.peers = args.peers.absolute()
    cores = sorted(os.sched_getaffinity(0))
    core, others = {cores[0]}, set(cores[1:]) or {cores[0]}
    os.sched_setaffinity(0, others)  # what is started inherits it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            model = save_tiny_model(folder / "tiny", corpus=invented_words(), vocab_size=8192)
            english = save_tiny_model(
                folder / "english",
                corpus=[json.dumps(tool(number, 2048)) for number in range(10)] + WORDS,
                vocab_size=2048,
                max_position_embeddings=16384,
            )
        against_dynamo(args, model, folder / "frontends", core)
        against_routers(args, model, folder / "routers", core)
        with_tools(args, english, folder / "tools", core)


if __name__ == "__main__":
    main()
