"""Which GPU memory of peers is within reach.

Decided per peer, by trying: the source exports its staging memory, and the puller sees whether it
can map it. Where kernels read it (`peer.py`) it stays mapped for as long as there is a link to the
peer, and no longer: memory of a dead process is not held on to. Whatever the reason against it
(another host, no peer access, a container of its own), the way through the host always works, and
the log says which one is taken and why.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from pathlib import Path
from typing import TypeGuard

from serving.kv_transfer.gpu_memory import CudaError, Gpu
from serving.kv_transfer.link import finish
from serving.kv_transfer.memory import Mapping, Staging
from serving.kv_transfer.wire import SharedMemory

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def this_host() -> str:
    """Equal in all processes on one kernel, containers included."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else secrets.token_hex(16)


@functools.cache
def this_process() -> str:
    """Process ids repeat between containers; this does not."""
    return secrets.token_hex(16)


class Reach:
    """Which peers' GPU memory this process can map. Asks the driver once per peer."""

    def __init__(self, gpu: Gpu | None, staging: Staging) -> None:
        self._gpu, self._staging = gpu, staging
        self._known: dict[bytes, bool] = {}
        self._mappings: dict[bytes, Mapping] = {}
        self._changing = asyncio.Lock()

    async def open(self, address: str, theirs: SharedMemory | None) -> Mapping | None:
        """The memory of the peer at `address`, mapped until as many `close`; None: out of reach."""
        opening = asyncio.ensure_future(self._open(address, theirs))
        try:
            return await finish(opening)
        except asyncio.CancelledError:
            if opening.exception() is None and (mapping := opening.result()):
                await finish(self.close(mapping))
            raise

    async def _open(self, address: str, theirs: SharedMemory | None) -> Mapping | None:
        if self._gpu is None or not _is_shared(address, theirs):
            return None
        if theirs.process == this_process():
            return Mapping(theirs.address, theirs.num_bytes, None, self._gpu.ordinal)
        key = theirs.process, theirs.handle
        async with self._changing:
            if theirs.handle in self._known:  # only what failed is
                return None
            mapping = self._mappings.get(key)
            if mapping is None:
                try:
                    mapped = await asyncio.to_thread(self._gpu.map, theirs.handle)
                except CudaError as exc:
                    log.warning("KV from %s comes through host memory: %s", address, exc)
                    self._known[theirs.handle] = False
                    return None
                log.info("KV from %s is read from its GPU", address)
                mapping = Mapping(mapped, theirs.num_bytes, key, self._gpu.ordinal)
                self._mappings[key] = mapping
            mapping.num_users += 1
            return mapping

    async def close(self, mapping: Mapping) -> None:
        """The last user's unmaps, after whoever read it. Not to be cancelled."""
        if mapping.key is None:
            return
        async with self._changing:
            mapping.num_users -= 1
            if mapping.num_users:
                return
            del self._mappings[mapping.key]
            assert self._gpu
            try:
                await asyncio.to_thread(self._gpu.unmap, mapping.address)
            except CudaError as exc:
                log.warning("a peer's GPU memory stays mapped: %s", exc)

    @property
    def mine(self) -> SharedMemory | None:
        """What a peer has to know before it shares its own."""
        return None if self._gpu is None else SharedMemory(this_host(), this_process(), b"")

    async def includes(self, address: str, theirs: SharedMemory | None) -> bool:
        """Whether blocks of the peer at `address` can come straight from its GPU to this one."""
        if self._gpu is None:
            return False
        if not _is_shared(address, theirs):
            return False
        if theirs.handle not in self._known:
            self._known[theirs.handle] = await self._try(self._gpu, address, theirs)
        return self._known[theirs.handle]

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


def _is_shared(address: str, theirs: SharedMemory | None) -> TypeGuard[SharedMemory]:
    if theirs is not None and theirs.handle:
        return True
    log.warning("KV from %s comes through host memory: its GPU shares none", address)
    return False


async def offer(
    gpu: Gpu | None, staging: Staging, theirs: SharedMemory | None
) -> SharedMemory | None:
    """What the source tells a peer that said where `theirs` is; None where they cannot meet."""
    if gpu is None or theirs is None or theirs.host != this_host():
        return None
    try:
        handle = await staging.share()
        slab = staging.slab
        return SharedMemory(this_host(), this_process(), handle, slab.address, slab.nbytes)
    except CudaError as exc:
        log.warning("KV leaves through host memory: %s", exc)
        return None
