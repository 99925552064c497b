"""KV from GPU to GPU: `kv_transfer.py --device cuda` runs this. Needs two GPUs, torch, ucxx.

Two processes, one GPU each (the other one visible, as in a deployment), KV pools of the
Llama-3-8B shape with shuffled blocks. What is timed is a pull: control messages, and all it takes
until every block is where it belongs. Contents are compared afterwards. Rows:

- `transfer 1k cuda`, `8k`, `32k`: blocks read in place, as a deployment does, against a `torch` copy
  of as many bytes between the two GPUs.
- `staged 1k cuda`, `8k`, `32k`: gather on the source's GPU, UCX, scatter on the other GPU.
- `nixl packed 8k`: the same over NIXL, where it is installed.
- `nixl per block 8k`: NIXL reading every layer of every block by itself (64 KiB each) without
  staging, and `nixl per whole block 8k` (2 MiB each), as our pool happens to lie in memory.
- `timeline 8k`: when each chunk was gathered and scattered, in ms since the pull began.
- `sweep 8k`: other chunk sizes and depths (with `--sweep`).
- `transfer 8k cuda isolated`: each process sees its own GPU only (with `--sweep`).

Where something fails or travels through the host, what UCX says about itself is printed to stderr.
`--dry` runs all of it on a CPU, in miniature, with a stand-in for the GPU: for working on this file.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import faulthandler
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from kv_ends import Held, host_view, params, transfer  # noqa: E402
from serving.engine.torch.kv.pool import KvPool  # noqa: E402
from serving.kv_layout import BlocksInPlace, KvLayout  # noqa: E402
from serving.kv_transfer import staging  # noqa: E402
from serving.kv_transfer.gpu_memory import GpuBuffer  # noqa: E402
from serving.kv_transfer.transports.nixl import nixl_module  # noqa: E402

LAYOUT = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
PROMPTS = {"1k": 1024, "8k": 8192, "32k": 32768}
WARM_UP, ROUNDS = 3, 9
LIMIT_NAME = "torch copy of as many bytes between the two GPUs"
TELLING = re.compile(r"cuda|tagged|tag\(|ERROR|WARN|UCX_")  # lines of UCX's log
SWEEP = [(32, 4), (64, 4), (64, 8), (128, 2), (128, 4), (256, 2), (256, 4)]  # MiB, depth


def tell(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- both processes -------------------------------------------------------------------------------


class End:
    """A pool whose blocks `order` hold prompt 0, 1, 2, ... in this order."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.dry: bool = options.dry
        self.device = "cpu" if self.dry else "cuda"
        self.num_blocks = LAYOUT.num_blocks(max(PROMPTS.values())) // (64 if self.dry else 1)
        self.pool = KvPool(LAYOUT, self.num_blocks, self.device)
        shuffled = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
        self.order = (shuffled + 1).tolist()
        self.spans: list[tuple[str, float, float]] = []

    def transfer(self, name: str, *, in_place: bool = False) -> Any:
        kind = "ucx-gpu" if self.dry and name == "ucx" else name
        options = {"chunk_bytes": None, "transfer_s": 30.0, "in_place": in_place}
        return transfer(kind, LAYOUT, device=self.device, **options)

    def blocks_of(self, tokens: int) -> int:
        return LAYOUT.num_blocks(tokens) // (64 if self.dry else 1) or 1

    def copy(self, kind: str, first: int, data: Any) -> None:
        """Between the pool and a staging buffer; remembers when."""
        started = time.monotonic()
        blocks = self.order[first : first + data.nbytes // LAYOUT.block_bytes]
        on_gpu = isinstance(data, GpuBuffer | BlocksInPlace)
        buffer = host_view(data) if self.dry and on_gpu else data
        (self.pool.gather if kind == "gather" else self.pool.scatter)(blocks, buffer)
        self.spans.append((kind, started, time.monotonic()))

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Words that block `first + i` of the prompt must hold: `[count, words]`."""
        words = torch.arange(LAYOUT.block_bytes // 4, device=self.device, dtype=torch.int64)
        block = torch.arange(first, first + count, device=self.device, dtype=torch.int64)
        return ((block[:, None] * 2654435761 + words * 40503) % 2147483647).to(torch.int32)

    def fill(self) -> None:
        for first in range(0, self.num_blocks, 64):
            data = self.rows(first, min(64, self.num_blocks - first))
            for row, block in zip(data, self.order[first : first + len(data)], strict=True):
                self.pool.tensor[block].view(-1).view(torch.int32).copy_(row)
        self.wait()

    def wrong_blocks(self, num_blocks: int) -> int:
        wrong = 0
        for first in range(0, num_blocks, 64):
            data = self.rows(first, min(64, num_blocks - first))
            for row, block in zip(data, self.order[first : first + len(data)], strict=True):
                wrong += not torch.equal(self.pool.tensor[block].view(-1).view(torch.int32), row)
        return wrong

    def clear(self) -> None:
        self.pool.tensor.zero_()
        self.wait()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def flat(self) -> torch.Tensor:
        return self.pool.tensor.view(-1).view(torch.uint8)


class Source(Held):
    def __init__(self, end: End) -> None:
        super().__init__()
        self._end = end
        self.memory = end.pool.memory

    def open(self, request_id: str, nonce: str) -> int:
        return self._end.num_blocks

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._end.copy("gather", first, out)

    @contextmanager
    def lend(self, request_id: str, first: int, count: int) -> Iterator[list[int]]:
        yield self._end.order[first : first + count]


def set_plan(chunk_mib: int, depth: int) -> None:
    size = chunk_mib << 20
    staging.GPU_SIZES = dataclasses.replace(
        staging.GPU_SIZES,
        chunk_bytes=size,
        least_bytes=min(size, 32 << 20),
        depth=depth,
        num_buffers=2 * depth,
    )


def nixl_agent(name: str) -> Any:
    """With the library's defaults, its progress thread included."""
    import importlib

    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    return importlib.import_module(f"{nixl_module()}._api").nixl_agent(name)


def region(data: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    kind = "VRAM" if data.is_cuda else "DRAM"
    return kind, (data.data_ptr(), data.nbytes, max(0, data.get_device()))


# --- the source -----------------------------------------------------------------------------------


async def serve(options: argparse.Namespace) -> None:
    """Answers questions, lines of JSON."""
    end = End(options, seed=1)
    end.fill()
    open_transfers: dict[str, Any] = {}
    agent: Any = None
    tell({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        try:
            match question:
                case {"open": name, "as": key, **plan}:
                    if "depth" in plan:
                        set_plan(plan["chunk_mib"], plan["depth"])
                    open_transfers[key] = end.transfer(name, in_place="in_place" in plan)
                    await open_transfers[key].serve(Source(end))
                    tell({"address": open_transfers[key].address})
                case {"close": key}:
                    await open_transfers.pop(key).close()
                    tell({})
                case {"spans": _}:
                    tell({"spans": end.spans})
                    end.spans.clear()
                case {"nixl": _}:
                    agent = nixl_agent("source")
                    kind, whole = region(end.flat())
                    agent.register_memory([(*whole, "")], kind)
                    described = base64.b64encode(agent.get_agent_metadata()).decode()
                    tell({"agent": described, "address": whole[0], "order": end.order})
        except Exception:
            tell({"error": traceback.format_exc()})
    for opened in open_transfers.values():
        await opened.close()


# --- the puller -----------------------------------------------------------------------------------


class Failed(Exception):
    pass


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def ask(self, question: Any = None, within_s: float = 60.0) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        if question is not None:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        while True:
            read = asyncio.to_thread(self._process.stdout.readline)
            line = await asyncio.wait_for(read, within_s)
            if not line:
                raise Failed(f"the source's process ended with {self._process.wait(5)}")
            if line.startswith("{"):
                break
            note(f"source: {line.rstrip()}")  # a library that talks on the standard output
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


@contextmanager
def source(options: argparse.Namespace, log: Path) -> Iterator[Child]:
    environment = {**os.environ, "UCX_LOG_FILE": str(log)}
    if options.source_visible:
        environment["CUDA_VISIBLE_DEVICES"] = options.source_visible
    arguments = ["--device", "cuda", "--source", *(["--dry"] if options.dry else [])]
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kv_transfer.py")), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield Child(process)
            assert process.stdin
            process.stdin.close()
            process.wait(15)
        finally:
            process.kill()


def copy_rate(num_bytes: int, dry: bool) -> float:
    """GB/s of a copy from the other GPU to this one."""
    here, there = ("cpu", "cpu") if dry else ("cuda:0", "cuda:1")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=here)
    origin = torch.empty(num_bytes, dtype=torch.uint8, device=there)
    taken = []
    for _ in range(WARM_UP + ROUNDS):
        if not dry:
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
        started = time.perf_counter()
        target.copy_(origin)
        if not dry:
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
        taken.append(time.perf_counter() - started)
    return num_bytes / statistics.median(taken[WARM_UP:]) / 1e9


class Bench:
    def __init__(self, options: argparse.Namespace, child: Child) -> None:
        self.options, self.child = options, child
        self.end = End(options, seed=2)
        self.limits: dict[str, float] = {}
        self.doubts: list[str] = []

    async def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """One row; what goes wrong with it is told and does not end the others."""
        started = time.monotonic()
        try:
            await asyncio.wait_for(work(), 40)
        except Exception as exc:
            tell({"name": name, "error": f"{type(exc).__name__}: {exc}"[:2000]})
            note(traceback.format_exc())
            self.doubts.append(name)
        note(f"{name}: {time.monotonic() - started:.1f} s in all")

    def limit(self, size: str) -> float | None:
        if self.options.no_limit:
            return None
        if size not in self.limits:
            num_bytes = self.end.blocks_of(PROMPTS[size]) * LAYOUT.block_bytes
            self.limits[size] = copy_rate(num_bytes, self.options.dry)
        return self.limits[size]

    async def pull(self, puller: Any, address: str, num_blocks: int) -> float:
        sink = lambda first, data: self.end.copy("scatter", first, data)  # noqa: E731
        started = time.perf_counter()
        await puller.pull(params(address, "a", num_blocks, LAYOUT), 0, num_blocks, sink)
        return time.perf_counter() - started

    async def measure(self, puller: Any, address: str, size: str, **more: Any) -> dict[str, Any]:
        num_blocks = self.end.blocks_of(PROMPTS[size])
        self.end.clear()
        taken = [await self.pull(puller, address, num_blocks) for _ in range(WARM_UP + ROUNDS)]
        if wrong := self.end.wrong_blocks(num_blocks):
            raise Failed(f"{wrong} of {num_blocks} blocks have other contents than were sent")
        taken = taken[WARM_UP:]
        return self.row(size, statistics.median(taken), best_s=min(taken), **more)

    def row(self, size: str, seconds: float, best_s: float, **more: Any) -> dict[str, Any]:
        num_bytes = self.end.blocks_of(PROMPTS[size]) * LAYOUT.block_bytes
        ours, limit = num_bytes / seconds / 1e9, self.limit(size)
        fields: dict[str, Any] = {"ours": round(ours, 1)}
        if limit is not None:
            fields |= {"limit": round(limit, 1), "limit_name": LIMIT_NAME}
            fields["ratio"] = round(ours / limit, 3)
        fields |= {"unit": "GB/s", "ms": round(1e3 * seconds, 3), "best_ms": round(1e3 * best_s, 3)}
        return fields | {"bytes": num_bytes, **more}

    async def read_in_place(self, sizes: list[str], suffix: str = "") -> None:
        """Every prompt as a deployment moves it."""
        opened = await self.child.ask({"open": "ucx", "as": "pool", "in_place": True})
        puller = self.end.transfer("ucx", in_place=True)
        try:
            for size in sizes:
                name = f"transfer {size} cuda{suffix}"

                async def one(size: str = size, name: str = name) -> None:
                    row = await self.measure(puller, opened["address"], size)
                    tell({"name": name, **row, "route": puller.route})
                    if "in place" not in puller.route:
                        self.doubts.append(f"{name} went over {puller.route}")

                await self.attempt(name, one)
        finally:
            await puller.close()
            await self.child.ask({"close": "pool"})

    async def staged(self, sizes: list[str], suffix: str = "") -> None:
        """Every prompt over UCX, then when each chunk of one of them was where."""
        opened = await self.child.ask({"open": "ucx", "as": "ucx"})
        puller = self.end.transfer("ucx")
        try:
            for size in sizes:
                name = f"staged {size} cuda{suffix}"

                async def one(size: str = size, name: str = name) -> None:
                    row = await self.measure(puller, opened["address"], size)
                    tell({"name": name, **row, "route": puller.route})
                    if puller.route != "cuda_ipc":
                        self.doubts.append(f"{name} went over {puller.route}")
                    elif size != "1k" and row.get("ratio", 1) < 0.5:
                        self.doubts.append(f"{name} reached {row['ratio']} of the limit")

                await self.attempt(name, one)
            if "8k" in sizes:
                await self.attempt("timeline 8k", lambda: self.timeline(puller, opened["address"]))
        finally:
            await puller.close()
            await self.child.ask({"close": "ucx"})

    async def timeline(self, puller: Any, address: str) -> None:
        await self.child.ask({"spans": True})
        self.end.spans.clear()
        started = time.monotonic()
        await self.pull(puller, address, self.end.blocks_of(PROMPTS["8k"]))
        ended = time.monotonic()
        spans = [*(await self.child.ask({"spans": True}))["spans"], *self.end.spans]
        in_ms = lambda t: round(1e3 * (t - started), 3)  # noqa: E731, one clock for all processes
        tell(
            {
                "name": "timeline 8k",
                "unit": "ms",
                "end": in_ms(ended),
                **{
                    kind: [[in_ms(a), in_ms(b)] for k, a, b in spans if k == kind]
                    for kind in ("gather", "scatter")
                },
            }
        )

    async def sweep(self) -> None:
        keep = await self.child.ask({"open": "ucx", "as": "keep"})  # UCX itself stays up
        del keep
        default = staging.GPU_SIZES
        for chunk_mib, depth in SWEEP:

            async def one(chunk_mib: int = chunk_mib, depth: int = depth) -> None:
                set_plan(chunk_mib, depth)
                plan = {"chunk_mib": chunk_mib, "depth": depth}
                opened = await self.child.ask({"open": "ucx", "as": "s", **plan})
                puller = self.end.transfer("ucx")
                try:
                    for size in ("1k", "8k", "32k"):
                        row = await self.measure(puller, opened["address"], size, **plan)
                        tell({"name": f"sweep {size}", **row, "route": puller.route})
                finally:
                    await puller.close()
                    await self.child.ask({"close": "s"})

            await self.attempt(f"sweep {chunk_mib} MiB, depth {depth}", one)
        staging.GPU_SIZES = default

    # --- NIXL --------------------------------------------------------------------------------

    async def nixl_packed(self) -> None:
        opened = await self.child.ask({"open": "nixl", "as": "nixl"})
        puller = self.end.transfer("nixl")
        try:
            row = await self.measure(puller, opened["address"], "8k")
            tell({"name": "nixl packed 8k", **row, "route": puller.route})
        finally:
            await puller.close()
            await self.child.ask({"close": "nixl"})

    async def nixl_per_block(self) -> None:
        """Descriptors of the library, straight from pool to pool."""
        told = await self.child.ask({"nixl": True})
        agent = nixl_agent("puller")
        kind, whole = region(self.end.flat())
        agent.register_memory([(*whole, "")], kind)
        peer = agent.add_remote_agent(base64.b64decode(told["agent"]))
        num_blocks = self.end.blocks_of(PROMPTS["8k"])
        for name, parts in (("per block", LAYOUT.num_layers), ("per whole block", 1)):
            size = LAYOUT.block_bytes // parts

            def pieces(base: int, order: list[int], size: int = size, parts: int = parts) -> Any:
                found = [
                    (base + block * LAYOUT.block_bytes + part * size, size, whole[2])
                    for block in order[:num_blocks]
                    for part in range(parts)
                ]
                return agent.get_xfer_descs(found, kind)

            mine, theirs = pieces(whole[0], self.end.order), pieces(told["address"], told["order"])
            self.end.clear()
            taken = []
            for _ in range(2 + 5):
                started = time.perf_counter()
                handle = agent.initialize_xfer("READ", mine, theirs, peer)
                state = agent.transfer(handle)
                while state == "PROC":
                    if time.perf_counter() - started > 10:
                        raise Failed("a NIXL read did not end within 10 s")
                    state = agent.check_xfer_state(handle)
                taken.append(time.perf_counter() - started)
                agent.release_xfer_handle(handle)
                if state != "DONE":
                    raise Failed(f"a NIXL read ended as {state}")
            if wrong := self.end.wrong_blocks(num_blocks):
                raise Failed(f"{wrong} of {num_blocks} blocks have other contents than were sent")
            row = self.row("8k", statistics.median(taken[2:]), best_s=min(taken[2:]))
            tell({"name": f"nixl {name} 8k", **row, "piece_bytes": size})


# --- around it ------------------------------------------------------------------------------------


def about(dry: bool) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "ucxx-cu13", "libucx-cu13", "nixl-cu13", "numpy", "msgspec"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    facts: dict[str, Any] = {"name": "about", "python": sys.version.split()[0], **versions}
    facts["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not dry:
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.device_count() > 1:
            facts["peer_access"] = torch.cuda.can_device_access_peer(0, 1)
    return facts


def diagnose(options: argparse.Namespace, seconds_left: float) -> None:
    """A short run again, with UCX saying how it decides, and once with other transports."""
    variants = {
        "as it is": {},
        "UCX_TLS=tcp,self,cuda_copy,cuda_ipc": {"UCX_TLS": "tcp,self,cuda_copy,cuda_ipc"},
    }
    for what, extra in variants.items():
        if seconds_left < 25:
            note("no time is left for more diagnosis (--budget-s)")
            return
        started = time.monotonic()
        environment = {**os.environ, **extra, "UCX_LOG_LEVEL": "info", "UCX_PROTO_INFO": "y"}
        command = [sys.executable, str(Path(__file__).with_name("kv_transfer.py"))]
        command += ["--device", "cuda", "--only", "1k", "--no-diagnosis", "--keep-log"]
        try:
            again = subprocess.run(
                [*command, *(["--dry"] if options.dry else [])],
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds_left,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            note(f"--- diagnosis, {what}: not over within {seconds_left:.0f} s\n{exc.stderr!r}")
            return
        note(
            f"--- diagnosis, {what}: rc {again.returncode}\n{again.stdout}\n{again.stderr[-9000:]}"
        )
        seconds_left -= time.monotonic() - started


async def run(options: argparse.Namespace) -> list[str]:
    log = Path(tempfile.mkdtemp(prefix="kv-cuda-"), "source-ucx.log")
    os.environ.setdefault("UCX_LOG_FILE", str(log.with_name("puller-ucx.log")))
    only: list[str] = options.only or list(PROMPTS)
    try:
        with source(options, log) as child:
            bench = Bench(options, child)
            await child.ask()
            suffix = " isolated" if options.no_limit else ""
            await bench.read_in_place(only, suffix)
            await bench.staged(only, suffix)
            if not options.only:
                if nixl_module():
                    await bench.attempt("nixl packed 8k", bench.nixl_packed)
                    await bench.attempt("nixl per block 8k", bench.nixl_per_block)
                else:
                    tell({"name": "nixl packed 8k", "skipped": "NIXL is not installed"})
                if options.sweep:
                    await bench.sweep()
            return bench.doubts
    finally:
        for name in sorted(log.parent.iterdir()):
            text = name.read_text(errors="replace")
            if text and (options.keep_log or "ERROR" in text or "WARN" in text):
                lines = [line for line in text.splitlines() if TELLING.search(line)]
                note(f"--- {name.name}\n" + "\n".join(lines[:60]))


def isolated(seconds_left: float) -> None:
    """Both processes again, blind for each other's GPU."""
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    command = [sys.executable, str(Path(__file__).with_name("kv_transfer.py")), "--device", "cuda"]
    command += ["--only", "8k", "--no-diagnosis", "--no-limit", "--source-visible", visible[1]]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible[0]}
    subprocess.run(command, env=environment, timeout=seconds_left, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda"])
    parser.add_argument("--only", action="append", choices=list(PROMPTS))
    parser.add_argument("--sweep", action="store_true", help="other chunk sizes, isolation")
    parser.add_argument("--budget-s", type=float, default=85.0)
    for name in ("--dry", "--source", "--no-diagnosis", "--keep-log", "--no-limit"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source-visible", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    started = time.monotonic()
    faulthandler.dump_traceback_later(options.budget_s + 5, exit=True)
    if not options.dry and not options.source:
        count = torch.cuda.device_count()
        if count < (1 if options.no_limit else 2):
            raise SystemExit(f"needs two CUDA GPUs, {count} found")
        if not options.source_visible:
            # As deployments do: device 0 is a process's own, and it sees its peer's.
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
            options.source_visible = ",".join([visible[1], visible[0]])
    try:
        import uvloop as loops
    except ImportError:
        loops = asyncio  # type: ignore[assignment]
    if options.source:
        loops.run(serve(options))
        return
    tell({**about(options.dry), "loop": loops.__name__})
    try:
        doubts = loops.run(run(options))
    except Exception:
        note(traceback.format_exc())
        doubts = ["it did not come to an end"]

    def left() -> float:
        return options.budget_s - (time.monotonic() - started)

    if doubts:
        note("doubts: " + "; ".join(doubts))
        if not options.no_diagnosis:
            diagnose(options, left())
    if options.sweep and not options.dry and left() > 20:
        isolated(left())
    if doubts and options.no_diagnosis:
        raise SystemExit(1)
