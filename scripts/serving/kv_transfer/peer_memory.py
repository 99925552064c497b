"""Which GPU memory two workers can share: the source's pool, or staging memory.

Each pair of workers finds out by trying. The source exports its pool (or else staging memory that
the transport moves), and the puller tries to map it. When that fails for any reason (another host,
no peer access, a container of its own), blocks travel through host memory, which always works. The
log names the way and the reason.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import weakref
from pathlib import Path

from serving.kv_layout import PoolMemory
from serving.kv_transfer.gpu_memory import CudaDevice, CudaError, Mapping
from serving.kv_transfer.messages import MemoryOffer
from serving.kv_transfer.staging import StagingMemory

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def this_host() -> str:
    """Equal in all processes on one kernel, containers included."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else secrets.token_hex(16)


class PeerMemory:
    """The pulling half: peers' GPU memory that this process can map. Tries once for each peer."""

    def __init__(
        self,
        gpu: CudaDevice | None,
        staging: StagingMemory,
        *,
        can_stage: bool,
        in_place: bool,
    ) -> None:
        """`can_stage`: the transport moves GPU memory. `in_place`: ask for the peer's pool."""
        self._gpu, self._staging, self._can_stage = gpu, staging, can_stage
        self._in_place = in_place
        self._staged: dict[bytes, bool] = {}
        # Mapped for as long as a channel refers to it: a mapping keeps a dead process's memory.
        self._pools: weakref.WeakValueDictionary[bytes, Mapping] = weakref.WeakValueDictionary()

    @property
    def request(self) -> MemoryOffer | None:
        """What a peer must know before it offers its own memory. None: this worker has no GPU."""
        if self._gpu is None:
            return None
        return MemoryOffer(this_host(), self._gpu.process, b"", is_pool=self._in_place)

    async def map_pool(self, address: str, offer: MemoryOffer | None) -> Mapping | None:
        """The pool of the peer at `address`, if its blocks can be read in place."""
        if self._gpu is None or offer is None or not offer.is_pool:
            return None
        if offer.process == self._gpu.process:
            return Mapping(offer.address)
        if (known := self._pools.get(offer.handle)) is not None:
            return known
        try:
            mapping = await asyncio.to_thread(self._gpu.map, offer.handle, offer.offset)
        except CudaError as exc:
            log.warning("KV from %s comes through host memory: %s", address, exc)
            return None
        log.info("KV from %s is read in place, from GPU to GPU", address)
        return self._pools.setdefault(offer.handle, mapping)

    async def can_stage(self, address: str, offer: MemoryOffer | None) -> bool:
        """Whether blocks can be staged on both GPUs: that of the peer at `address` and this one."""
        if self._gpu is None or not self._can_stage:
            return False
        if offer is None or not offer.handle:
            log.warning("KV from %s comes through host memory: its GPU shares none", address)
            return False
        if offer.is_pool:
            return False  # `map_pool` has logged why
        if offer.handle not in self._staged:
            self._staged[offer.handle] = await self._try(self._gpu, address, offer)
        return self._staged[offer.handle]

    async def _try(self, gpu: CudaDevice, address: str, offer: MemoryOffer) -> bool:
        try:
            await self._staging.share()
            if offer.process != gpu.process:
                await asyncio.to_thread(gpu.try_to_map, offer.handle)
        except CudaError as exc:
            log.warning("KV from %s comes through host memory: %s", address, exc)
            return False
        log.info("KV from %s comes from GPU to GPU", address)
        return True


class MemoryOffers:
    """The serving half: decides which of this worker's GPU memory a peer may map."""

    def __init__(
        self,
        gpu: CudaDevice | None,
        staging: StagingMemory,
        pool: PoolMemory | None,
        *,
        can_stage: bool,
    ) -> None:
        """`pool` None: peers must not read blocks in place."""
        self._gpu, self._staging, self._can_stage = gpu, staging, can_stage
        self._pool = self._export(pool)

    @property
    def has_pool(self) -> bool:
        return self._pool is not None

    async def answer(self, request: MemoryOffer | None) -> MemoryOffer | None:
        """The memory for a peer that sent `request`. None: the two can share nothing."""
        if self._gpu is None or request is None or request.host != this_host():
            return None
        if self._pool is not None and request.is_pool:
            return self._pool
        if not self._can_stage:
            return None
        try:
            return MemoryOffer(this_host(), self._gpu.process, await self._staging.share())
        except CudaError as exc:
            log.warning("KV leaves through host memory: %s", exc)
            return None

    def _export(self, pool: PoolMemory | None) -> MemoryOffer | None:
        if self._gpu is None or pool is None:
            return None
        try:
            handle, offset = self._gpu.export_at(pool.address)
        except CudaError as exc:
            log.warning("KV is staged, since the pool's memory cannot be shared: %s", exc)
            return None
        return MemoryOffer(this_host(), self._gpu.process, handle, True, offset, pool.address)
