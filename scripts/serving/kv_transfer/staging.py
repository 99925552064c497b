"""Staging memory: a bounded set of equal, page-aligned buffers, reused between transfers.

A buffer that a transport may still write to after its transfer failed is quarantined: it stays
referenced and out of circulation until the transport has let go of it.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from serving.kv_transfer.gpu_memory import GpuBuffer

log = logging.getLogger(__name__)

HostBuffer = np.ndarray[Any, np.dtype[np.uint8]]
Buffer = HostBuffer | GpuBuffer
Unsettled = Collection[asyncio.Future[Any]]


def host_pages(num_bytes: int) -> HostBuffer:
    """Private pages: aligned, made when first touched, returned to the system when dropped."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=np.uint8)


class Lease:
    """Buffers in the hands of one transfer."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        self.unsettled: set[asyncio.Future[Any]] = set()

    def quarantine(self, unsettled: Unsettled) -> None:
        """Nobody may use these buffers before all of `unsettled` are done."""
        self.unsettled.update(unsettled)


class StagingPool:
    """At most `capacity` buffers of `buffer_bytes`, made when first needed and then kept."""

    def __init__(
        self,
        buffer_bytes: int,
        capacity: int,
        make: Callable[[int], Buffer] = host_pages,
    ) -> None:
        self.buffer_bytes, self.capacity = buffer_bytes, capacity
        self._make_buffer = make
        self._free: list[Buffer] = []
        self._num_made = 0
        self._waiting: deque[tuple[int, asyncio.Future[list[Buffer]]]] = deque()
        self._quarantined: set[tuple[asyncio.Future[Any], ...]] = set()

    @property
    def available(self) -> int:
        """Buffers that could be leased now."""
        return len(self._free) + self.capacity - self._num_made

    @asynccontextmanager
    async def lease(self, count: int) -> AsyncIterator[Lease]:
        """`count` buffers at once, first come first served (taken singly, two could deadlock)."""
        assert count <= self.capacity
        lease = Lease(await self._take(count))
        try:
            yield lease
        finally:
            unsettled = tuple(task for task in lease.unsettled if not task.done())
            if unsettled:
                self._hold(lease.buffers, unsettled)
            else:
                self._give_back(lease.buffers)

    async def _take(self, count: int) -> list[Buffer]:
        turn: asyncio.Future[list[Buffer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._serve_waiting()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # served and cancelled in the same turn of the loop
                self._give_back(turn.result())
            raise

    def _serve_waiting(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self.available < count:
                return
            else:
                self._waiting.popleft()
                turn.set_result(
                    [self._free.pop() if self._free else self._make() for _ in range(count)]
                )

    def _make(self) -> Buffer:
        self._num_made += 1
        return self._make_buffer(self.buffer_bytes)

    def _give_back(self, buffers: list[Buffer]) -> None:
        self._free.extend(buffers)
        self._serve_waiting()

    def _hold(self, buffers: list[Buffer], unsettled: tuple[asyncio.Future[Any], ...]) -> None:
        log.warning("%d staging buffers quarantined: the transport still holds them", len(buffers))
        self._quarantined.add(unsettled)

        def settled(_: asyncio.Future[Any]) -> None:
            # `buffers` lives in this closure, which the pending futures hold.
            if unsettled in self._quarantined and all(task.done() for task in unsettled):
                self._quarantined.discard(unsettled)
                self._give_back(buffers)

        for task in unsettled:
            task.add_done_callback(settled)
