"""Both endpoints of a KV transfer for tests and benchmarks: known blocks, a source and a sink.

`python tests/kv_ends.py serve ucx|tcp` is a source in a process of its own: it prints its address
and serves until its input closes. `... pull ucx|tcp ADDRESS` pulls everything, at `PAUSE_S` per
chunk, and prints a line for each chunk.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).parents[1] / "scripts"

if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPTS))

from serving.config import KvTransferConfig  # noqa: E402
from serving.kv_layout import BlocksInPlace, KvLayout, PoolMemory  # noqa: E402
from serving.kv_transfer import KvTransfer, PrefillProgress  # noqa: E402
from serving.kv_transfer.gpu_memory import (  # noqa: E402
    HANDLE_BYTES,
    CudaDevice,
    CudaError,
    GpuBuffer,
    Mapping,
)
from serving.kv_transfer.staging_pool import host_pages  # noqa: E402
from serving.kv_transfer.transport import Transport  # noqa: E402
from serving.kv_transfer.transports.ucx import UcxTransport  # noqa: E402
from serving.protocol import KvTransferParams  # noqa: E402

# 64 KiB a block.
LAYOUT = KvLayout.uniform(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32")
OTHER_LAYOUT = KvLayout.uniform(
    num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16"
)
PAUSE_S = 0.2
Blocks = np.ndarray[Any, np.dtype[np.uint8]]


def random_blocks(num_blocks: int, layout: KvLayout = LAYOUT, seed: int = 1) -> Blocks:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_blocks, layout.block_bytes), dtype=np.uint8)


class Held:
    """A BlockSource over known blocks per request; every nonce is `n-<request>`."""

    def __init__(self, **requests: Blocks) -> None:
        self.requests = requests
        self.computed: dict[str, PrefillProgress] = {}
        self.done_with: list[str] = []
        self.pause_s = 0.0
        self.error: Exception | None = None
        self.reading = threading.Event()
        self.memory: PoolMemory | None = None
        self.num_lent = 0

    def open(self, request_id: str, nonce: str) -> int:
        if request_id not in self.requests:
            raise KeyError(request_id)
        if nonce != f"n-{request_id}":
            raise PermissionError(nonce)
        return len(self.requests[request_id])

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        """`computed`, once it is more than `beyond`. Without an entry there: everything."""
        while True:
            held = self.open(request_id, nonce)
            found = self.computed.get(request_id, PrefillProgress(held, 7))
            if found.token is not None or found.num_blocks > beyond:
                return found
            await asyncio.sleep(0.002)

    def read(self, request_id: str, first: int, out: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.reading.set()
        time.sleep(self.pause_s)
        if self.error:
            raise self.error
        blocks = self.requests[request_id]
        target = host_view(out).reshape(-1, blocks.shape[1])
        target[:] = blocks[first : first + len(target)]

    @contextmanager
    def lend(self, request_id: str, first: int, count: int) -> Iterator[list[int]]:
        raise AssertionError("it has no pool")

    def done(self, request_id: str) -> None:
        self.done_with.append(request_id)


class HeldInPool(Held):
    """The same blocks in one pool, in another order, to be read in place."""

    def __init__(self, **requests: Blocks) -> None:
        super().__init__(**requests)
        count = sum(map(len, requests.values()))
        order = np.random.default_rng(7).permutation(count).tolist()
        self.ids = {name: [order.pop() for _ in blocks] for name, blocks in requests.items()}
        block_bytes = next((blocks.shape[1] for blocks in requests.values()), LAYOUT.block_bytes)
        self.pool = np.zeros((max(1, count), block_bytes), np.uint8)
        for name, blocks in requests.items():
            self.pool[self.ids[name]] = blocks
        self.memory = PoolMemory(self.pool.ctypes.data, self.pool.nbytes)

    @contextmanager
    def lend(self, request_id: str, first: int, count: int) -> Iterator[list[int]]:
        self.reading.set()
        if self.error:
            raise self.error
        ids = self.ids[request_id][first : first + count]
        self.num_lent += count
        try:
            yield ids
        finally:
            self.num_lent -= count

    def read(self, request_id: str, first: int, out: Any) -> None:
        raise AssertionError("a copy of what can be read in place")


class Got:
    """A ChunkSink into an array like the source's."""

    def __init__(self, like: Blocks) -> None:
        self.blocks = np.zeros_like(like)
        self.calls: list[tuple[int, int]] = []
        self.pause_s = 0.0
        self.error: Exception | None = None
        self.on_gpu = self.in_place = False
        self.started, self.ended = threading.Event(), threading.Event()

    def __call__(self, first: int, data: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.ended.clear()
        self.started.set()
        self.on_gpu = isinstance(data, GpuBuffer)
        self.in_place = isinstance(data, BlocksInPlace)
        piece = host_view(data).reshape(-1, self.blocks.shape[1])
        time.sleep(self.pause_s)
        if self.error:
            raise self.error
        self.blocks[first : first + len(piece)] = piece
        self.calls.append((first, len(piece)))
        self.ended.set()


def host_view(buffer: Any) -> Blocks:
    """The bytes of a staging buffer; those of the stand-in for a GPU lie in host memory."""
    if isinstance(buffer, BlocksInPlace):
        block_bytes = buffer.nbytes // len(buffer.block_ids)
        rows = int(buffer.block_ids.max()) + 1
        whole = (ctypes.c_uint8 * (rows * block_bytes)).from_address(buffer.address)
        return np.frombuffer(whole, np.uint8).reshape(rows, -1)[buffer.block_ids].reshape(-1)
    if isinstance(buffer, GpuBuffer):
        buffer = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)
    return np.frombuffer(buffer, dtype=np.uint8)


class GpuInHostMemory(CudaDevice):
    """Stands in for a GPU: everything but the driver is real.

    `maps` False: memory cannot be shared between processes. `process` is whose GPU it is.
    """

    def __init__(self, *, maps: bool = True, process: str = "this process") -> None:
        self.ordinal, self.process, self.maps = 0, process, maps
        self._pages: list[Any] = []

    def allocate(self, nbytes: int) -> GpuBuffer:
        self._pages.append(host_pages(nbytes))
        return GpuBuffer(self._pages[-1].ctypes.data, nbytes, 0)

    def export(self, buffer: GpuBuffer) -> bytes:
        return os.urandom(HANDLE_BYTES)

    def export_at(self, address: int) -> tuple[bytes, int]:
        if not self.maps:
            raise CudaError("memory of a kind that is not shared")
        return os.urandom(HANDLE_BYTES), 0

    def map(self, handle: bytes, offset: int) -> Mapping:
        raise CudaError("no peer access")

    def try_to_map(self, handle: bytes) -> None:
        if not self.maps:
            raise CudaError("no peer access")

    def pin(self, pages: Any) -> None:
        """Host memory needs no pinning for a copy within the host."""


class UcxThatMovesGpuMemory(UcxTransport):
    """UCX with stand-ins for GPUs, whose memory it can move because it is host memory."""

    async def start(self) -> bytes:
        address = await super().start()
        self.moves_gpu_memory = True
        return address


def transfer(
    name: str,
    layout: KvLayout = LAYOUT,
    *,
    device: str = "cpu",
    gpu: CudaDevice | None = None,
    transport: Transport | None = None,
    **settings: Any,
) -> KvTransfer:
    """`ucx-gpu` is UCX between two stand-ins for a GPU; `tcp-gpu` is TCP, which moves no GPU memory.

    `settings` are those of the `kv_transfer` section.
    """
    scheme, _, kind = name.partition("-")
    defaults = {"chunk_bytes": 1 << 20, "connect_s": 5.0, "transfer_s": 20.0}
    config = KvTransferConfig(transport=scheme, **{**defaults, **settings})  # type: ignore[arg-type]
    host = "127.0.0.1"
    if kind == "gpu":
        gpu = gpu or GpuInHostMemory()
        transport = UcxThatMovesGpuMemory(host) if scheme == "ucx" else None
    return KvTransfer(config, layout, host=host, device=device, transport=transport, gpu=gpu)


def params(
    address: str, request_id: str, num_blocks: int, layout: KvLayout = LAYOUT
) -> KvTransferParams:
    return KvTransferParams(
        source_instance="prefill-0",
        source_epoch=1,
        address=address,
        request_id=request_id,
        nonce=f"n-{request_id}",
        num_tokens=num_blocks * layout.block_size,
        num_blocks=num_blocks,
        layout=layout.fingerprint,
    )


@asynccontextmanager
async def serving(
    name: str, held: Held, layout: KvLayout = LAYOUT, **changed: Any
) -> AsyncIterator[KvTransfer]:
    end = transfer(name, layout, **changed)
    try:
        await end.serve(held)
        yield end
    finally:
        await end.close()


@asynccontextmanager
async def pulling(
    name: str, layout: KvLayout = LAYOUT, **changed: Any
) -> AsyncIterator[KvTransfer]:
    end = transfer(name, layout, **changed)
    try:
        yield end
    finally:
        await end.close()


# --- in another process -------------------------------------------------------------------------

REMOTE_BLOCKS = 256  # 16 MiB


@contextmanager
def process(
    *arguments: str, file: str = __file__, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """This file (or another) as a process; killed at the end unless it ended by itself when its
    input closed."""
    path = [str(SCRIPTS), environment.pop("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    # UCX would warn on the standard output, which is for answers.
    inherited = {"UCX_LOG_FILE": "stderr", **os.environ}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with subprocess.Popen(
        [sys.executable, file, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**inherited, **environment},
    ) as child:
        try:
            yield child
            assert child.stdin
            child.stdin.close()
            child.wait(20)
        finally:
            child.kill()


async def line_of(child: subprocess.Popen[str], within_s: float = 30.0) -> str:
    assert child.stdout
    async with asyncio.timeout(within_s):
        line: str = await asyncio.to_thread(child.stdout.readline)
    assert line, "the process ended"
    return line.strip()


async def _serve(name: str, pause_s: str = "0") -> None:
    held = Held(far=random_blocks(REMOTE_BLOCKS))
    held.pause_s = float(pause_s)
    async with serving(name, held) as end:
        print(end.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def _pull(name: str, address: str) -> None:
    got = Got(random_blocks(REMOTE_BLOCKS))
    got.pause_s = PAUSE_S

    def sink(first: int, data: Any) -> None:
        got(first, data)
        print(f"chunk at {first}", flush=True)

    async with pulling(name) as end:
        await end.pull(params(address, "far", REMOTE_BLOCKS), 0, REMOTE_BLOCKS, sink)
    print("complete", flush=True)


if __name__ == "__main__":
    asyncio.run({"serve": _serve, "pull": _pull}[sys.argv[1]](*sys.argv[2:]))
