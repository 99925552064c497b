"""The process that pulls: it starts the source, measures pulls of all kinds and checks contents."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.kv_cuda.ends import (
    LAYOUT,
    PROMPTS,
    End,
    nixl_agent,
    note,
    region,
    set_plan,
    write_row,
)
from kv_ends import params
from serving.kv_transfer import staging

SCRIPT = Path(__file__).resolve().parents[1] / "kv_transfer.py"
WARM_UP, ROUNDS = 3, 9
LIMIT_NAME = "torch copy of as many bytes between the two GPUs"
SWEEP = [(32, 4), (64, 4), (64, 8), (128, 2), (128, 4), (256, 2), (256, 4)]  # MiB, depth


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
        [sys.executable, str(SCRIPT), *arguments],
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
        """One row. A failure is reported and does not end the other rows."""
        started = time.monotonic()
        try:
            await asyncio.wait_for(work(), 40)
        except Exception as exc:
            write_row({"name": name, "error": f"{type(exc).__name__}: {exc}"[:2000]})
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
                    write_row({"name": name, **row, "route": puller.route})
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
                    write_row({"name": name, **row, "route": puller.route})
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
        write_row(
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
                        write_row({"name": f"sweep {size}", **row, "route": puller.route})
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
            write_row({"name": "nixl packed 8k", **row, "route": puller.route})
        finally:
            await puller.close()
            await self.child.ask({"close": "nixl"})

    async def nixl_per_block(self) -> None:
        """Descriptors of the library, straight from pool to pool."""
        remote = await self.child.ask({"nixl": True})
        agent = nixl_agent("puller")
        kind, whole = region(self.end.flat())
        agent.register_memory([(*whole, "")], kind)
        peer = agent.add_remote_agent(base64.b64decode(remote["agent"]))
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

            mine, theirs = (
                pieces(whole[0], self.end.order),
                pieces(remote["address"], remote["order"]),
            )
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
            write_row({"name": f"nixl {name} 8k", **row, "piece_bytes": size})
