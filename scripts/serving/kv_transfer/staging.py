"""The staging memory of a worker: how large chunks are, and how many a transfer has in flight."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from serving.kv_layout import KvLayout
from serving.kv_transfer.gpu_memory import CudaDevice, CudaError, GpuBuffer
from serving.kv_transfer.staging_pool import Buffer, HostBuffer, StagingPool, host_pages
from serving.kv_transfer.transport import TransferEndpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagingSizes:
    """How transfers use one kind of memory.

    A transfer stages `depth` chunks: some are copied while others travel. Chunks have up to
    `chunk_bytes`. They are smaller, down to `least_bytes`, where there would be fewer than `depth`.
    """

    chunk_bytes: int
    least_bytes: int
    depth: int
    num_buffers: int  # in each direction; further transfers wait for their turn


HOST_SIZES = StagingSizes(chunk_bytes=8 << 20, least_bytes=8 << 20, depth=2, num_buffers=16)
# A message between GPUs costs about 0.1 ms, as long as NVLink needs for 32 MiB. Of all sizes and
# depths tried on two H100, these were the fastest for 1k, 8k and 32k tokens of an 8B model.
GPU_SIZES = StagingSizes(chunk_bytes=256 << 20, least_bytes=32 << 20, depth=2, num_buffers=4)


class StagingMemory:
    """The staging memory of one half of a worker's transfers.

    Each half has its own, or two workers that pull from each other could deadlock.
    """

    def __init__(
        self,
        layout: KvLayout,
        chunk_bytes: int | None,
        gpu: CudaDevice | None,
        register: Callable[[Buffer], None],
    ) -> None:
        """`chunk_bytes` None: the size that suits the memory. `gpu` has the engine's blocks."""
        self._layout, self._chunk_bytes, self._gpu = layout, chunk_bytes, gpu
        self._register = register
        self._host = StagingPool(
            self._max_blocks(HOST_SIZES) * layout.block_bytes,
            HOST_SIZES.num_buffers,
            self._make_host,
        )
        self._on_gpu: StagingPool | None = None
        self._handle = b""
        self._sharing = asyncio.Lock()

    @classmethod
    def for_endpoint(cls, endpoint: TransferEndpoint) -> StagingMemory:
        return cls(
            endpoint.layout,
            endpoint.config.chunk_bytes,
            endpoint.gpu,
            endpoint.transport.register,
        )

    def pool(self, on_gpu: bool) -> StagingPool:
        if not on_gpu:
            return self._host
        assert self._on_gpu, "`share` comes first"
        return self._on_gpu

    @property
    def has_gpu(self) -> bool:
        return self._on_gpu is not None

    def depth(self, on_gpu: bool) -> int:
        """Chunks that one transfer stages at a time."""
        return _sizes(on_gpu).depth

    def chunk_blocks(self, on_gpu: bool, num_blocks: int) -> int:
        """Blocks in each chunk of a transfer of `num_blocks`."""
        sizes = _sizes(on_gpu)
        least = max(1, sizes.least_bytes // self._layout.block_bytes)
        wanted = max(least, -(-num_blocks // sizes.depth))
        return min(wanted, self._max_blocks(sizes))

    async def share(self) -> bytes:
        """Make the GPU's staging memory, once. Returns the handle by which a peer can map it.

        Raises CudaError when there is no memory for it, or it cannot be shared.
        """
        if self._gpu is None:
            raise CudaError("this worker's KV is not on a GPU")
        async with self._sharing:
            if self._on_gpu is None:
                self._handle, self._on_gpu = await asyncio.to_thread(self._make_gpu, self._gpu)
        return self._handle

    def _make_gpu(self, gpu: CudaDevice) -> tuple[bytes, StagingPool]:
        # One allocation, so that a peer maps once.
        num_bytes = self._max_blocks(GPU_SIZES) * self._layout.block_bytes
        slab = gpu.allocate(GPU_SIZES.num_buffers * num_bytes)
        self._register(slab)
        parts = [slab[i * num_bytes : (i + 1) * num_bytes] for i in range(GPU_SIZES.num_buffers)]
        log.info("%.0f MiB of GPU %d stage KV", slab.nbytes / 2**20, gpu.ordinal)

        def make(_: int) -> GpuBuffer:
            return parts.pop()

        return gpu.export(slab), StagingPool(num_bytes, GPU_SIZES.num_buffers, make)

    def _make_host(self, num_bytes: int) -> Buffer:
        pages: HostBuffer = host_pages(num_bytes)
        if self._gpu is not None:
            try:
                self._gpu.pin(pages)
            except CudaError as exc:  # copies are slower, nothing else
                log.warning("staging memory is not pinned: %s", exc)
        self._register(pages)
        return pages

    def _max_blocks(self, sizes: StagingSizes) -> int:
        return max(1, (self._chunk_bytes or sizes.chunk_bytes) // self._layout.block_bytes)


def _sizes(on_gpu: bool) -> StagingSizes:
    return GPU_SIZES if on_gpu else HOST_SIZES
