"""A bounded set of equal, page-aligned buffers that transfers borrow in turn.

A transport may still write to a buffer after its transfer failed. Such a buffer is quarantined: it
stays allocated, and nobody borrows it, until the transport no longer uses it.
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


def host_pages(num_bytes: int) -> HostBuffer:
    """Private, aligned pages. The system provides them when they are first touched, and takes them
    back when the array is dropped."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=np.uint8)


class BorrowedBuffers:
    """Buffers that one transfer uses until its `borrow` context ends."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        self.unsettled: set[asyncio.Future[Any]] = set()

    def quarantine(self, unsettled: Collection[asyncio.Future[Any]]) -> None:
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
        """Buffers that could be borrowed now."""
        return len(self._free) + self.capacity - self._num_made

    @asynccontextmanager
    async def borrow(self, count: int) -> AsyncIterator[BorrowedBuffers]:
        """`count` buffers at once, first come, first served. Two transfers that took their buffers
        one by one could deadlock."""
        assert count <= self.capacity
        borrowed = BorrowedBuffers(await self._take(count))
        try:
            yield borrowed
        finally:
            unsettled = tuple(future for future in borrowed.unsettled if not future.done())
            if unsettled:
                self._quarantine(borrowed.buffers, unsettled)
            else:
                self._give_back(borrowed.buffers)

    async def _take(self, count: int) -> list[Buffer]:
        turn: asyncio.Future[list[Buffer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._serve_waiting()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it got its buffers in the loop turn that cancelled it
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

    def _quarantine(
        self, buffers: list[Buffer], unsettled: tuple[asyncio.Future[Any], ...]
    ) -> None:
        log.warning("%d staging buffers quarantined: the transport still uses them", len(buffers))
        self._quarantined.add(unsettled)

        def settled(_: asyncio.Future[Any]) -> None:
            # This closure keeps `buffers` alive; the pending futures hold the closure.
            if unsettled in self._quarantined and all(future.done() for future in unsettled):
                self._quarantined.discard(unsettled)
                self._give_back(buffers)

        for future in unsettled:
            future.add_done_callback(settled)
