"""Blocks between two GPUs of one host without a transport: the puller's kernel reads them.

The source gathers a chunk into its staging memory, which the puller has mapped, and says where it
lies; the puller scatters from there straight into its blocks, and says that it has. So each byte
crosses once, no message carries it, and only the source stages. Two chunks at a time on either
side: one is copied while the other's kernel is being launched. The connection carries all of it.

A buffer is the source's again when its chunk is `Scattered`, or the pull `Stop`ped, which a puller
says when no kernel of its reads. When the connection ends instead, one may: that is harmless to
the source, but what it reads may be of another pull by then. So the source ends the connection
before it gives the buffers back, which it does some time later, and a puller whose connection has
ended when its last kernel has drops everything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from serving.kv_transfer.base import ChunkSink
from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.link import SETTLE_S, Side, finish, stop
from serving.kv_transfer.memory import Mapping
from serving.kv_transfer.staging import Buffer
from serving.kv_transfer.wire import (
    Connection,
    Gathered,
    Message,
    ProtocolError,
    Received,
    Refusal,
    Refused,
    Scattered,
    Stop,
    Stopped,
)

ROUTE = "cuda_ipc mapped"
AT_ONCE = 2  # copies of one pull, per side

Chunks = list[tuple[int, int]]


class _Half:
    """What both halves of one pull have: messages and copies, and one event that says that there
    is news of either. (A task or a wait for each would cost as much as a copy.)"""

    def __init__(self, connection: Connection, side: Side) -> None:
        self.connection, self._side = connection, side
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._inbox: deque[Message] = deque()
        self._copies: deque[asyncio.Future[None]] = deque()  # under way, in the order of chunks
        self._listening = asyncio.create_task(self._listen(), name="kv-peer")
        self._listening.add_done_callback(self._tell)

    async def close(self) -> None:
        """When the other side says nothing more, or the connection will be closed."""
        await stop([self._listening])
        if not self._listening.cancelled():
            self._listening.exception()  # nobody may have looked at it

    async def _listen(self) -> None:
        """Until a message that its sender follows with another request."""
        while True:
            message = await self.connection.receive()
            self._inbox.append(message)
            self._news.set()
            if isinstance(message, Received | Stop):
                return

    def _copy(self, work: Callable[..., None], *arguments: Any) -> None:
        copy = self._loop.run_in_executor(self._side.threads, work, *arguments)
        copy.add_done_callback(self._tell)
        self._copies.append(copy)

    def _tell(self, _: object) -> None:
        self._news.set()

    async def _wait(self) -> None:
        """For news. Raises ConnectionError (or another OSError) when the connection is lost."""
        if self._listening.done() and not self._inbox:
            self._listening.result()
        await self._news.wait()
        self._news.clear()

    async def _settle(self) -> None:
        """Let the copies under way end, also when cancelled: they touch memory."""
        copies = list(self._copies)
        self._copies.clear()
        if not copies:
            return
        await finish(asyncio.gather(*copies, return_exceptions=True))


class Lending(_Half):
    """The source's half: gathers, lends, and takes back."""

    def __init__(self, connection: Connection, side: Side) -> None:
        super().__init__(connection, side)
        self.lent: dict[int, Buffer] = {}
        """By chunk: what the other side may be reading."""

    async def run(
        self,
        chunks: Chunks,
        buffers: Collection[Buffer],
        slab: GpuBuffer,
        gather: Callable[[int, Buffer], None],
    ) -> bool:
        """Whether the peer has all `chunks`. `gather(first_block, out)` is called in threads, and
        none is running when this returns or raises; a Refusal from it is told to the peer."""
        free, gathered_to = deque(buffers), deque[GpuBuffer]()
        num_begun = num_told = 0
        refused = False
        try:
            while True:
                while (
                    num_begun < len(chunks) and free and len(self._copies) < AT_ONCE and not refused
                ):
                    first, count = chunks[num_begun]
                    data = free.popleft()[: count * self._side.layout.block_bytes]
                    assert isinstance(data, GpuBuffer)
                    self._copy(gather, first, data)
                    gathered_to.append(data)
                    num_begun += 1
                if self._copies and self._copies[0].done() and not refused:
                    data = gathered_to.popleft()
                    try:
                        self._copies.popleft().result()
                    except Refusal as refusal:
                        refused = True  # what is left to come is the peer's `Stop`
                        await self.connection.send(Refused(str(refusal)))
                        continue
                    self.lent[num_told] = data
                    await self.connection.send(Gathered(num_told, data.address - slab.address))
                    num_told += 1
                elif self._inbox:
                    message = self._inbox.popleft()
                    if isinstance(message, Scattered) and message.index in self.lent:
                        free.append(self._whole(self.lent.pop(message.index), buffers))
                    elif isinstance(message, Received) and num_told == len(chunks):
                        return True
                    elif isinstance(message, Stop):
                        await self._settle()
                        await self.connection.send(Stopped(num_told))
                        return False
                    else:
                        raise ProtocolError(f"{message} after {num_told} of {len(chunks)} chunks")
                else:
                    await self._wait()
        finally:
            await self._settle()

    @staticmethod
    def _whole(part: Buffer, buffers: Collection[Buffer]) -> Buffer:
        """The buffer that `part` is the beginning of."""
        assert isinstance(part, GpuBuffer)
        return next(b for b in buffers if isinstance(b, GpuBuffer) and b.address == part.address)


class Reading(_Half):
    """The puller's half: scatters from the source's memory."""

    async def run(self, chunks: Chunks, mapping: Mapping, sink: ChunkSink) -> None:
        """Raises Refusal, ConnectionError or another OSError, and what `sink` raises, which is not
        running when this returns or raises."""
        num_begun = num_told = 0
        try:
            while num_told < len(chunks):
                while self._inbox and len(self._copies) < AT_ONCE:
                    message = self._inbox.popleft()
                    if isinstance(message, Refused):
                        raise Refusal(message.reason)
                    if (
                        not isinstance(message, Gathered)
                        or num_begun == len(chunks)
                        or message.index != num_begun
                    ):
                        raise ProtocolError(f"{message} instead of chunk {num_begun}")
                    first, count = chunks[num_begun]
                    num_bytes = count * self._side.layout.block_bytes
                    self._copy(sink, first, mapping.part(message.offset, num_bytes))
                    num_begun += 1
                if self._copies and self._copies[0].done():
                    self._copies.popleft().result()
                    num_told += 1
                    if num_told < len(chunks):  # the last one goes without saying
                        await self.connection.send(Scattered(num_told - 1))
                else:
                    await self._wait()
        finally:
            await self._settle()
        if not self.connection.quiet:
            raise ConnectionResetError("the connection ended while the last blocks were read")

    async def give_up(self) -> bool:
        """Stop midway, while nothing is read. True when the connection can be used again."""
        if self._listening.done():
            return False
        try:
            async with asyncio.timeout(SETTLE_S):
                await self.connection.send(Stop())
                while True:
                    while self._inbox:
                        if isinstance(self._inbox.popleft(), Stopped):
                            return True
                    await self._wait()
        except OSError:  # a deadline is one, too
            return False
