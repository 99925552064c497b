"""Where blocks are staged: in host memory, or on the GPU where both ends can reach each other's.

How transfers use each (`Plan`), and one half's buffers. Which it is, `reach.py` decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from serving.kv_layout import KvLayout
from serving.kv_transfer.gpu_memory import CudaError, Gpu, GpuBuffer, PeerBuffer
from serving.kv_transfer.staging import Buffer, HostBuffer, StagingPool, host_pages
from serving.kv_transfer.wire import ProtocolError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How transfers use one kind of memory.

    A transfer stages `depth` chunks: some are copied while others travel. It uses chunks of up to
    `chunk_bytes`, and smaller ones (down to `least_bytes`) where there would be fewer than `depth`.
    """

    chunk_bytes: int
    least_bytes: int
    depth: int
    num_buffers: int  # per direction; more transfers wait for their turn
    first_bytes: int = 0  # of the first chunk, and each following has twice as many; 0: no ramp


HOST = Plan(chunk_bytes=8 << 20, least_bytes=8 << 20, depth=2, num_buffers=16)
# A message between GPUs costs about 0.1 ms whatever its size: as long as 32 MiB take over NVLink.
GPU = Plan(chunk_bytes=128 << 20, least_bytes=32 << 20, depth=4, num_buffers=8)
# Read by the peer's kernels: a chunk costs the two processes about 0.1 ms of control each, beside
# the copies. It begins small, so that the first one is soon on its way.
PEER = Plan(
    chunk_bytes=128 << 20, least_bytes=32 << 20, depth=4, num_buffers=8, first_bytes=16 << 20
)


@dataclass
class Mapping:
    """A peer's staging memory, where kernels of this side's GPU can read it."""

    address: int
    num_bytes: int
    key: tuple[str, bytes] | None  # process and handle; None: this very process's memory
    device: int
    num_users: int = 0

    def part(self, offset: int, num_bytes: int) -> PeerBuffer:
        """Raises ProtocolError for what is not in there: a kernel that reads there would end the
        process."""
        if not 0 <= offset <= offset + num_bytes <= self.num_bytes:
            raise ProtocolError(f"{num_bytes} bytes at {offset} of {self.num_bytes}")
        return PeerBuffer(self.address + offset, num_bytes, self.device)


class Staging:
    """The staging memory of one half of a worker's transfers.

    Each half has its own: two workers that pull from each other must not wait in a ring.
    """

    def __init__(
        self,
        layout: KvLayout,
        chunk_bytes: int | None,
        gpu: Gpu | None,
        register: Callable[[Buffer], None],
        *,
        peers_read: bool = False,
    ) -> None:
        """`chunk_bytes` None: what suits the memory. `gpu`: where the engine's blocks are.
        `peers_read`: memory on the GPU is read by kernels of the peer's."""
        self._layout, self._chunk_bytes, self._gpu = layout, chunk_bytes, gpu
        self._gpu_plan = PEER if peers_read else GPU
        self._register = register
        self._host = StagingPool(
            self._max_blocks(HOST) * layout.block_bytes, HOST.num_buffers, self._make_host
        )
        self._on_gpu: StagingPool | None = None
        self._handle = b""
        self._slab: GpuBuffer | None = None
        self._sharing = asyncio.Lock()

    def pool(self, on_gpu: bool) -> StagingPool:
        if not on_gpu:
            return self._host
        assert self._on_gpu, "shared before"
        return self._on_gpu

    @property
    def has_gpu(self) -> bool:
        return self._on_gpu is not None

    @property
    def slab(self) -> GpuBuffer:
        """All of the GPU's staging memory."""
        assert self._slab, "shared before"
        return self._slab

    def depth(self, on_gpu: bool) -> int:
        return self._plan(on_gpu).depth

    def chunk_blocks(self, on_gpu: bool, num_blocks: int) -> int:
        """Blocks per chunk for a transfer of `num_blocks`."""
        plan = self._plan(on_gpu)
        least = max(1, plan.least_bytes // self._layout.block_bytes)
        wanted = max(least, -(-num_blocks // plan.depth))
        return min(wanted, self._max_blocks(plan))

    def first_blocks(self, on_gpu: bool, chunk_blocks: int) -> int:
        """Of the first chunk where others have `chunk_blocks`; 0: no fewer."""
        first = self._plan(on_gpu).first_bytes // self._layout.block_bytes
        return first if first < chunk_blocks else 0

    async def share(self) -> bytes:
        """Make the GPU's staging memory, once; returns the handle by which a peer can map it.

        Raises CudaError when there is no memory for it, or it cannot be shared.
        """
        if self._gpu is None:
            raise CudaError("this worker's KV is not on a GPU")
        async with self._sharing:
            if self._on_gpu is None:
                self._handle, self._on_gpu = await asyncio.to_thread(self._make_gpu, self._gpu)
        return self._handle

    def _make_gpu(self, gpu: Gpu) -> tuple[bytes, StagingPool]:
        # One allocation, so that a peer maps once.
        plan = self._gpu_plan
        num_bytes = self._max_blocks(plan) * self._layout.block_bytes
        self._slab = slab = gpu.allocate(plan.num_buffers * num_bytes)
        self._register(slab)
        parts = [slab[i * num_bytes : (i + 1) * num_bytes] for i in range(plan.num_buffers)]
        log.info("%.0f MiB of GPU %d stage KV", slab.nbytes / 2**20, gpu.ordinal)

        def make(_: int) -> GpuBuffer:
            return parts.pop()

        return gpu.export(slab), StagingPool(num_bytes, plan.num_buffers, make)

    def _make_host(self, num_bytes: int) -> Buffer:
        pages: HostBuffer = host_pages(num_bytes)
        if self._gpu is not None:
            try:
                self._gpu.pin(pages)
            except CudaError as exc:  # slower, no more
                log.warning("staging memory is not pinned: %s", exc)
        self._register(pages)
        return pages

    def _plan(self, on_gpu: bool) -> Plan:
        return self._gpu_plan if on_gpu else HOST

    def _max_blocks(self, plan: Plan) -> int:
        return max(1, (self._chunk_bytes or plan.chunk_bytes) // self._layout.block_bytes)
