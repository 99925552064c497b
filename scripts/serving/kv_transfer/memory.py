"""Where blocks are read from: the source's pool itself, or staging memory on GPUs, or in the host.

Decided per peer, by trying: the source exports its pool (or else staging memory that UCX reaches),
and the puller sees whether it can map it. Whatever the reason (another host, no peer access, a
container of its own), the way through the host always works, and the log says which one is taken
and why.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.kv_layout import KvLayout, PoolMemory
from serving.kv_transfer.gpu_memory import CudaError, Gpu, GpuBuffer, Mapping
from serving.kv_transfer.staging import Buffer, HostBuffer, StagingPool, host_pages
from serving.kv_transfer.wire import SharedMemory

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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


HOST = Plan(chunk_bytes=8 << 20, least_bytes=8 << 20, depth=2, num_buffers=16)
# A message between GPUs costs about 0.1 ms whatever its size: as long as 32 MiB take over NVLink.
# Of all sizes and depths tried on two H100, the fastest for 1k, 8k and 32k tokens of an 8B model.
GPU = Plan(chunk_bytes=256 << 20, least_bytes=32 << 20, depth=2, num_buffers=4)


@functools.cache
def this_host() -> str:
    """Equal in all processes on one kernel, containers included."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else secrets.token_hex(16)


@functools.cache
def this_process() -> str:
    """Process ids repeat between containers; this does not."""
    return secrets.token_hex(16)


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
    ) -> None:
        """`chunk_bytes` None: what suits the memory. `gpu`: where the engine's blocks are."""
        self._layout, self._chunk_bytes, self._gpu = layout, chunk_bytes, gpu
        self._register = register
        self._host = StagingPool(
            self._max_blocks(HOST) * layout.block_bytes, HOST.num_buffers, self._make_host
        )
        self._on_gpu: StagingPool | None = None
        self._handle = b""
        self._sharing = asyncio.Lock()

    def pool(self, on_gpu: bool) -> StagingPool:
        if not on_gpu:
            return self._host
        assert self._on_gpu, "shared before"
        return self._on_gpu

    @property
    def has_gpu(self) -> bool:
        return self._on_gpu is not None

    def depth(self, on_gpu: bool) -> int:
        return self._plan(on_gpu).depth

    def chunk_blocks(self, on_gpu: bool, num_blocks: int) -> int:
        """Blocks per chunk for a transfer of `num_blocks`."""
        plan = self._plan(on_gpu)
        least = max(1, plan.least_bytes // self._layout.block_bytes)
        wanted = max(least, -(-num_blocks // plan.depth))
        return min(wanted, self._max_blocks(plan))

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
        num_bytes = self._max_blocks(GPU) * self._layout.block_bytes
        slab = gpu.allocate(GPU.num_buffers * num_bytes)
        self._register(slab)
        parts = [slab[i * num_bytes : (i + 1) * num_bytes] for i in range(GPU.num_buffers)]
        log.info("%.0f MiB of GPU %d stage KV", slab.nbytes / 2**20, gpu.ordinal)

        def make(_: int) -> GpuBuffer:
            return parts.pop()

        return gpu.export(slab), StagingPool(num_bytes, GPU.num_buffers, make)

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
        return GPU if on_gpu else HOST

    def _max_blocks(self, plan: Plan) -> int:
        return max(1, (self._chunk_bytes or plan.chunk_bytes) // self._layout.block_bytes)


class Reach:
    """Which peers' GPU memory this process can map. Asks the driver once per peer."""

    def __init__(
        self, gpu: Gpu | None, staging: Staging, *, can_stage: bool, in_place: bool
    ) -> None:
        """`can_stage`: whether the transport moves GPU memory. `in_place`: whether to ask for it."""
        self._gpu, self._staging, self._can_stage = gpu, staging, can_stage
        self._in_place = in_place
        self._staged: dict[bytes, bool] = {}
        # As long as a link refers to it: a mapping keeps the memory of a dead process.
        self._pools: weakref.WeakValueDictionary[bytes, Mapping] = weakref.WeakValueDictionary()

    @property
    def mine(self) -> SharedMemory | None:
        """What a peer has to know before it shares its own."""
        if self._gpu is None:
            return None
        return SharedMemory(this_host(), this_process(), b"", is_pool=self._in_place)

    async def pool(self, address: str, theirs: SharedMemory | None) -> Mapping | None:
        """The blocks of the peer at `address`, if they can be read in place."""
        if self._gpu is None or theirs is None or not theirs.is_pool:
            return None
        if theirs.process == this_process():
            return Mapping(theirs.address)
        if (known := self._pools.get(theirs.handle)) is not None:
            return known
        try:
            mapping = await asyncio.to_thread(self._gpu.map, theirs.handle, theirs.offset)
        except CudaError as exc:
            log.warning("KV from %s comes through host memory: %s", address, exc)
            return None
        log.info("KV from %s is read in place, from GPU to GPU", address)
        return self._pools.setdefault(theirs.handle, mapping)

    async def includes(self, address: str, theirs: SharedMemory | None) -> bool:
        """Whether blocks can be staged on both GPUs, that of the peer at `address` and this one."""
        if self._gpu is None or not self._can_stage:
            return False
        if theirs is None or not theirs.handle:
            log.warning("KV from %s comes through host memory: its GPU shares none", address)
            return False
        if theirs.is_pool:
            return False  # `pool` told why
        if theirs.handle not in self._staged:
            self._staged[theirs.handle] = await self._try(self._gpu, address, theirs)
        return self._staged[theirs.handle]

    async def _try(self, gpu: Gpu, address: str, theirs: SharedMemory) -> bool:
        try:
            await self._staging.share()
            if theirs.process != this_process():
                await asyncio.to_thread(gpu.try_to_map, theirs.handle)
        except CudaError as exc:
            log.warning("KV from %s comes through host memory: %s", address, exc)
            return False
        log.info("KV from %s comes from GPU to GPU", address)
        return True


class Offers:
    """What the source tells of its memory to a peer that said where its own is."""

    def __init__(
        self, gpu: Gpu | None, staging: Staging, pool: PoolMemory | None, *, can_stage: bool
    ) -> None:
        """`pool` None: blocks are not to be read in place."""
        self._gpu, self._staging, self._can_stage = gpu, staging, can_stage
        self._pool = self._exported(pool)

    @property
    def has_pool(self) -> bool:
        return self._pool is not None

    async def to(self, theirs: SharedMemory | None) -> SharedMemory | None:
        """None where the two cannot meet."""
        if self._gpu is None or theirs is None or theirs.host != this_host():
            return None
        if self._pool is not None and theirs.is_pool:
            return self._pool
        if not self._can_stage:
            return None
        try:
            return SharedMemory(this_host(), this_process(), await self._staging.share())
        except CudaError as exc:
            log.warning("KV leaves through host memory: %s", exc)
            return None

    def _exported(self, pool: PoolMemory | None) -> SharedMemory | None:
        if self._gpu is None or pool is None:
            return None
        try:
            handle, offset = self._gpu.export_at(pool.address)
        except CudaError as exc:
            log.warning("KV is staged, since the pool's memory cannot be shared: %s", exc)
            return None
        return SharedMemory(this_host(), this_process(), handle, True, offset, pool.address)
