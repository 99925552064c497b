"""KV transfers against the prefill they follow, and against a plain socket.

    python tests/benchmarks/kv_transfer.py [--engine-dir DIR] [--rounds N] [--threads N]
    python tests/benchmarks/kv_transfer.py --device cuda [--sweep]      (see kv_cuda/run.py)

Source and puller are two processes, as in a deployment. Rows, one JSON object a line:

- `transfer 512 tokens vs prefill`: gather, UCX and scatter between two torch engines, over the
  time that the prefill of the same prompt took on the other side. The engine is the newest of
  results/engines; without one the row says why it is missing.
- `ucx vs loopback socket`, `tcp vs loopback socket`: 20 MB of SmolLM2-135M blocks from memory to
  memory, against the same bytes sent and received by blocking socket calls, in turns.

Medians of `--rounds`, after two rounds that do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning steals processor time
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

if __name__ == "__main__" and "cuda" in sys.argv:
    # Before everything that this needs and the other does not: it runs without an engine.
    from benchmarks.kv_cuda.run import main as main_cuda

    main_cuda()
    raise SystemExit

import msgspec  # noqa: E402
from benchmarks.engines.engine_under_test import find_engine  # noqa: E402
from kv_ends import Got, Held, params, pulling, random_blocks, serving  # noqa: E402
from serving.config import EngineConfig  # noqa: E402
from serving.engine.torch.engine import TorchEngine  # noqa: E402
from serving.kv_layout import KvLayout  # noqa: E402
from serving.kv_transfer import PrefillProgress  # noqa: E402
from serving.load_report import LoadReport  # noqa: E402
from serving.protocol import (  # noqa: E402
    EngineOutput,
    EngineRequest,
    KvEvent,
    KvTransferParams,
    SamplingParams,
)

SMOLLM2 = KvLayout.uniform(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32"
)
NUM_BLOCKS = 28  # of 737,280 bytes
NUM_BYTES = NUM_BLOCKS * SMOLLM2.block_bytes
CHUNK_BYTES = 8 << 20  # kv_transfer.chunk_bytes by default
PROMPT_TOKENS = 512
NUM_WARM_UP = 2


def row(name: str, ours_s: list[float], other_s: list[float], **other: str) -> None:
    """Times in ms; `other` is {"peer_name" or "limit_name": ...}."""
    ours, theirs = (1e3 * statistics.median(s[NUM_WARM_UP:]) for s in (ours_s, other_s))
    kind = "peer" if "peer_name" in other else "limit"
    fields = {"name": name, "ours": round(ours, 3), kind: round(theirs, 3), **other}
    print(json.dumps({**fields, "unit": "ms", "ratio": round(ours / theirs, 4)}), flush=True)


class Peer:
    """The other process: this file with another argument, spoken to in lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    async def ask(self, question: Any = None) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        if question is not None:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), 300)
        if not line:
            raise SystemExit("the other process ended")
        return json.loads(line)


@contextmanager
def peer(*arguments: str, file: str = __file__) -> Iterator[Peer]:
    with subprocess.Popen(
        [sys.executable, file, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Peer(process)
            assert process.stdin
            process.stdin.close()
            process.wait(30)
        finally:
            process.kill()


async def questions() -> Any:
    """Lines of JSON from the other process, until it closes our input."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


def answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


# --- transports against a plain socket ------------------------------------------------------------


def serve_plain(listener: socket.socket, data: bytes) -> None:
    """Send `data` for each byte received, until the peer is gone."""
    sock, _ = listener.accept()
    with sock:
        while sock.recv(1):
            sock.sendall(data)


async def hold_blocks() -> None:
    """The source's process: the same blocks over UCX, TCP and a plain socket."""
    blocks = random_blocks(NUM_BLOCKS, SMOLLM2)
    held = Held(a=blocks)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_plain, args=(listener, blocks.tobytes()))
        thread.start()
        async with (
            serving("ucx", held, SMOLLM2, chunk_bytes=CHUNK_BYTES) as ucx,
            serving("tcp", held, SMOLLM2, chunk_bytes=CHUNK_BYTES) as tcp,
        ):
            plain_port = listener.getsockname()[1]
            answer({"ucx": ucx.address, "tcp": tcp.address, "plain": plain_port})
            async for _ in questions():
                pass
        thread.join(10)


def receive_plain(sock: socket.socket, into: memoryview) -> None:
    sock.sendall(b"x")
    done = 0
    while done < len(into):
        done += sock.recv_into(into[done:])


async def compare_transports(rounds: int) -> None:
    taken: dict[str, list[float]] = {"plain": [], "tcp": [], "ucx": []}
    expected = random_blocks(NUM_BLOCKS, SMOLLM2)
    memory, got = bytearray(NUM_BYTES), Got(expected)  # made once: new pages cost time to touch
    with peer("--hold-blocks") as other:
        addresses = await other.ask()
        async with (
            pulling("ucx", SMOLLM2, chunk_bytes=CHUNK_BYTES) as ucx,
            pulling("tcp", SMOLLM2, chunk_bytes=CHUNK_BYTES) as tcp,
        ):
            ends = {"tcp": tcp, "ucx": ucx}
            with socket.create_connection(("127.0.0.1", addresses["plain"])) as sock:
                for _ in range(NUM_WARM_UP + rounds):
                    started = time.perf_counter()
                    receive_plain(sock, memoryview(memory))
                    taken["plain"].append(time.perf_counter() - started)
                    for name, end in ends.items():
                        got.blocks[:] = 0
                        wanted = params(addresses[name], "a", NUM_BLOCKS, SMOLLM2)
                        started = time.perf_counter()
                        await end.pull(wanted, 0, NUM_BLOCKS, got)
                        taken[name].append(time.perf_counter() - started)
                        assert (got.blocks == expected).all()
    for name in ("ucx", "tcp"):
        row(
            f"{name} vs loopback socket",
            taken[name],
            taken["plain"],
            limit_name=f"loopback socket, {NUM_BYTES} bytes",
        )


# --- transfer against prefill ---------------------------------------------------------------------


class Worker:
    """A torch engine and what came out of it, by request."""

    def __init__(
        self,
        engine_dir: Path,
        threads: int,
        prompt_tokens: int = PROMPT_TOKENS,
        chunk_tokens: int = PROMPT_TOKENS,
    ) -> None:
        self.engine = TorchEngine(
            engine_dir,
            EngineConfig(
                dtype="float32",
                max_model_len=2 * prompt_tokens,
                block_size=SMOLLM2.block_size,
                kv_cache_tokens=8 * prompt_tokens,
                max_batch_size=8,
                max_num_batched_tokens=chunk_tokens,
                max_waiting=64,
                num_threads=threads,
            ),
            "cpu",
            hash_salt="benchmark",
            fingerprint="benchmark",
        )
        self._finished: dict[str, asyncio.Future[EngineOutput]] = {}
        self.on_output: Callable[[EngineOutput], None] = lambda _: None

    async def start(self) -> None:
        await self.engine.start(self._receive)

    def expect(self, request_id: str) -> asyncio.Future[EngineOutput]:
        future: asyncio.Future[EngineOutput] = asyncio.get_running_loop().create_future()
        self._finished[request_id] = future
        return future

    def _receive(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        del events, load
        for output in outputs:
            self.on_output(output)
            if output.finish_reason and output.request_id in self._finished:
                self._finished.pop(output.request_id).set_result(output)


class Exports:
    """A BlockSource over the engine's held blocks; the nonce is `n-<request>` as in `kv_ends`."""

    def __init__(self, worker: Worker) -> None:
        self._kv = worker.engine.kv

    def open(self, request_id: str, nonce: str) -> int:
        if nonce != f"n-{request_id}":
            raise PermissionError(nonce)
        if not (held := self._kv.exported(request_id)):
            raise KeyError(request_id)
        return held

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        return PrefillProgress(self.open(request_id, nonce), 0)

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._kv.read(request_id, first, out)

    def done(self, request_id: str) -> None:
        self._kv.release(request_id)


async def prefill_on_request(engine_dir: Path, threads: int) -> None:
    """The prefill worker's process: computes the prompts it is asked for and holds their KV."""
    worker = Worker(engine_dir, threads)
    await worker.start()
    layout = worker.engine.spec.kv_layout
    assert layout
    try:
        async with serving("ucx", Exports(worker), layout, chunk_bytes=CHUNK_BYTES) as end:
            answer("ready")
            async for question in questions():
                request = EngineRequest(
                    question["id"],
                    question["tokens"],
                    len(question["tokens"]),
                    SamplingParams(max_tokens=1, temperature=0),
                    phase="prefill",
                )
                finished = worker.expect(request.request_id)
                started = time.perf_counter()
                worker.engine.submit(request)
                output = await finished
                seconds = time.perf_counter() - started
                num_blocks = worker.engine.kv.exported(request.request_id)
                wanted = params(end.address, request.request_id, num_blocks, layout)
                wanted = msgspec.structs.replace(wanted, num_tokens=len(request.token_ids))
                answer(
                    {
                        "seconds": seconds,
                        "token": output.token_ids[0],
                        "params": msgspec.to_builtins(wanted),
                    }
                )
    finally:
        await worker.engine.close()


async def compare_with_prefill(engine_dir: Path, rounds: int, threads: int) -> None:
    random_source = random.Random(7)
    prefills, transfers = [], []
    worker = Worker(engine_dir, threads)
    await worker.start()
    layout = worker.engine.spec.kv_layout
    assert layout
    try:
        with peer("--prefill", "--engine-dir", str(engine_dir), "--threads", str(threads)) as other:
            await other.ask()
            async with pulling("ucx", layout, chunk_bytes=CHUNK_BYTES) as end:
                for index in range(NUM_WARM_UP + rounds):
                    tokens = [random_source.randrange(1000, 30000) for _ in range(PROMPT_TOKENS)]
                    prefilled = await other.ask({"id": f"r{index}", "tokens": tokens})
                    wanted = msgspec.convert(prefilled["params"], KvTransferParams)
                    request = EngineRequest(
                        f"r{index}",
                        [*tokens, prefilled["token"]],
                        PROMPT_TOKENS,
                        SamplingParams(max_tokens=4, temperature=0),
                        phase="decode",
                        kv_transfer_params=wanted,
                    )
                    finished = worker.expect(request.request_id)
                    async with worker.engine.kv.reserve(request) as reservation:
                        first, count = reservation.first_block, reservation.num_blocks
                        started = time.perf_counter()
                        received = await end.pull(wanted, first, count, reservation.write)
                        transfers.append(time.perf_counter() - started)
                        reservation.commit()
                    assert received == PROMPT_TOKENS * layout.token_bytes
                    await finished
                    prefills.append(prefilled["seconds"])
    finally:
        await worker.engine.close()
    row(
        f"transfer {PROMPT_TOKENS} tokens vs prefill",
        transfers,
        prefills,
        limit_name=f"prefill of the same prompt, {threads} threads",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--hold-blocks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prefill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold_blocks:
        asyncio.run(hold_blocks())
        return
    engine_dir = find_engine(options.engine_dir)
    if options.prefill:
        asyncio.run(prefill_on_request(engine_dir, options.threads))
        return
    asyncio.run(compare_with_prefill(engine_dir, options.rounds, options.threads))
    asyncio.run(compare_transports(options.rounds))


if __name__ == "__main__":
    main()
