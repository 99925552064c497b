"""The decode half: asks a peer for blocks and passes them to a sink as they arrive."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import numpy as np

from serving.errors import KvTransferFailed
from serving.framing import ProtocolError
from serving.kv_layout import BlocksInPlace
from serving.kv_transfer.cancellation import finish, stop
from serving.kv_transfer.channel_pool import ChannelPool
from serving.kv_transfer.contract import ChunkSink, PrefillProgress
from serving.kv_transfer.messages import (
    MAX_BLOCKS_IN_PLACE,
    Computed,
    Follow,
    Granted,
    Pull,
    Received,
    Refusal,
    Refused,
    Stop,
    Stopped,
    chunk_ranges,
)
from serving.kv_transfer.pace import TransferPace
from serving.kv_transfer.staging import StagingMemory
from serving.kv_transfer.staging_pool import BorrowedBuffers, Buffer
from serving.kv_transfer.transport import SETTLE_S, TransferChannel, TransferEndpoint
from serving.protocol import KvTransferParams

EndGrant = Callable[[TransferChannel], Awaitable[None]]
"""Ends a granted pull whose blocks are not, or not all, wanted; keeps or discards the channel."""


class Puller:
    """Pulls blocks from peers. Each pull has a channel to its peer for itself."""

    def __init__(self, endpoint: TransferEndpoint) -> None:
        self._endpoint = endpoint
        self._staging = StagingMemory.for_endpoint(endpoint)
        self._channels = ChannelPool(endpoint, self._staging)
        self.route = ""
        self._running: set[asyncio.Timeout] = set()
        self._none_running = asyncio.Event()
        self._none_running.set()
        self._closed = False
        self._pace = TransferPace(endpoint.config.transfer_s)
        # The upper bits are random, so that a late chunk of an earlier process or of a failed pull
        # is never mistaken for a chunk of this one.
        self._tags = itertools.count(secrets.randbits(39) << 24, 1 << 24)

    async def progress(
        self, params: KvTransferParams, beyond: int, within_s: float
    ) -> PrefillProgress:
        """See `KvTransfer.progress`."""
        follow = Follow(params.request_id, params.nonce, beyond)
        async with self._deadline(params, within_s):
            while True:
                channel, reused = await self._channels.take(params.address)
                try:
                    reply = await self._channels.exchange(channel, follow, within_s)
                except BaseException as exc:
                    await finish(self._channels.discard(channel))
                    if reused and isinstance(exc, ConnectionError):
                        continue  # it was lost while idle
                    raise
                break
            self._channels.keep(channel)
            if isinstance(reply, Computed):
                return PrefillProgress(reply.num_blocks, reply.token)
            if isinstance(reply, Refused):
                raise Refusal(reply.reason)
            raise ProtocolError("neither computed nor refused")

    async def pull(
        self,
        params: KvTransferParams,
        first_block: int,
        num_blocks: int,
        sink: ChunkSink,
        *,
        more_follows: bool,
    ) -> int:
        """See `KvTransfer.pull`."""
        request = Pull(
            request_id=params.request_id,
            nonce=params.nonce,
            layout=self._endpoint.layout.fingerprint,
            first_block=first_block,
            num_blocks=num_blocks,
            chunk_blocks=1,
            tag=next(self._tags),
            more_follows=more_follows,
        )
        num_bytes = num_blocks * self._endpoint.layout.block_bytes
        began = asyncio.get_running_loop().time()
        limit_s = self._pace.limit_s(num_bytes, len(self._running))
        async with self._deadline(params, limit_s):
            on_gpu = in_place = False
            if num_blocks:
                on_gpu, in_place = await self._channels.memory_paths(params.address)
            if in_place:
                await self._pull_in_place(params.address, request, sink)
            else:
                await self._pull_staged(params.address, request, on_gpu, sink)
        if num_bytes:
            self._pace.took(num_bytes, asyncio.get_running_loop().time() - began)
        return num_bytes

    async def close(self) -> None:
        """Fail the pulls under way, then close every channel."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for deadline in self._running:
            if not deadline.expired():
                deadline.reschedule(now)
        await self._none_running.wait()
        await self._channels.close()

    @asynccontextmanager
    async def _deadline(self, params: KvTransferParams, within_s: float) -> AsyncIterator[None]:
        """Runs a request to a peer. It ends in time or when this endpoint closes, and every failure
        is a KvTransferFailed."""
        failed = functools.partial(KvTransferFailed, params.request_id, params.source_instance)
        if self._closed:
            raise failed("this endpoint is closed")
        ours = self._endpoint.layout.fingerprint
        if params.layout != ours:
            raise failed(f"its layout is {params.layout}, ours {ours}")
        deadline = asyncio.timeout(within_s)
        self._running.add(deadline)
        self._none_running.clear()
        try:
            async with deadline:
                yield
        except TimeoutError as exc:
            reason = f"not complete within {within_s:g} s"
            if self._closed:
                reason = "this endpoint was closed"
            elif not deadline.expired():
                reason = str(exc) or "timed out"
            raise failed(reason) from exc
        except (OSError, Refusal) as exc:
            raise failed(str(exc) or type(exc).__name__) from exc
        finally:
            self._running.discard(deadline)
            if not self._running:
                self._none_running.set()

    # --- through staging memory ----------------------------------------------------------------

    async def _pull_staged(
        self, address: str, request: Pull, on_gpu: bool, sink: ChunkSink
    ) -> None:
        chunk_blocks = self._staging.chunk_blocks(on_gpu, request.num_blocks)
        request = msgspec.structs.replace(request, chunk_blocks=chunk_blocks, on_gpu=on_gpu)
        depth = min(self._staging.depth(on_gpu), -(-request.num_blocks // chunk_blocks))
        async with self._staging.pool(on_gpu).borrow(depth) as borrowed:
            end_grant = functools.partial(self._stop_receiving, request, borrowed)
            channel, granted = await self._ask(address, request, end_grant)
            self.route = granted.route
            try:
                await self._receive_chunks(channel, request, granted, borrowed.buffers, sink)
                await channel.connection.send(Received())
            except BaseException:
                await finish(end_grant(channel))
                raise
            self._channels.keep(channel)

    async def _stop_receiving(
        self, request: Pull, borrowed: BorrowedBuffers, channel: TransferChannel
    ) -> None:
        buffers = borrowed.buffers
        if buffers and await channel.stop_receiving(request.tag, buffers[0]):
            self._channels.keep(channel)
        else:
            borrowed.quarantine(await self._channels.discard(channel))

    async def _receive_chunks(
        self,
        channel: TransferChannel,
        request: Pull,
        granted: Granted,
        buffers: list[Buffer],
        sink: ChunkSink,
    ) -> None:
        """Scatter chunk k while chunk k + 1 arrives."""
        if not 1 <= granted.chunk_blocks <= request.chunk_blocks:
            raise ProtocolError(f"chunks of {granted.chunk_blocks} blocks")
        chunks = chunk_ranges(request.first_block, request.num_blocks, granted.chunk_blocks)
        loop = asyncio.get_running_loop()
        arriving: deque[tuple[asyncio.Task[None], Buffer]] = deque()

        def expect(index: int) -> None:
            buffer, (_, count) = buffers[index % len(buffers)], chunks[index]
            data = buffer[: count * self._endpoint.layout.block_bytes]
            receiving = channel.receive(request.tag, index, data)
            arriving.append((asyncio.create_task(receiving, name="kv-receive"), data))

        try:
            for index in range(min(len(buffers), len(chunks))):
                expect(index)
            for index, (first, _) in enumerate(chunks):
                arrival, data = arriving[0]
                await arrival
                await finish(loop.run_in_executor(self._endpoint.threads, sink, first, data))
                arriving.popleft()
                if index + len(buffers) < len(chunks):
                    expect(index + len(buffers))
        finally:
            await stop(arrival for arrival, _ in arriving)
        await channel.finished()

    # --- in place ------------------------------------------------------------------------------

    async def _pull_in_place(self, address: str, request: Pull, sink: ChunkSink) -> None:
        end = request.first_block + request.num_blocks
        for first, count in chunk_ranges(
            request.first_block, request.num_blocks, MAX_BLOCKS_IN_PLACE
        ):
            part = msgspec.structs.replace(
                request,
                first_block=first,
                num_blocks=count,
                in_place=True,
                more_follows=request.more_follows or first + count < end,
            )
            await self._read_in_place(address, part, sink)

    async def _read_in_place(self, address: str, request: Pull, sink: ChunkSink) -> None:
        """Pass at most MAX_BLOCKS_IN_PLACE blocks to the sink where they lie, in the peer's pool."""
        channel, granted = await self._ask(address, request, self._stop_reading)
        self.route = granted.route
        try:
            block_ids = np.frombuffer(granted.blocks, "<i4")
            pool = channel.peer_blocks
            if len(block_ids) != request.num_blocks or pool is None:
                raise ProtocolError(f"{len(block_ids)} blocks instead of {request.num_blocks}")
            num_bytes = request.num_blocks * self._endpoint.layout.block_bytes
            blocks = BlocksInPlace(pool.address, block_ids, num_bytes, pool)
            reading = asyncio.get_running_loop().run_in_executor(
                self._endpoint.threads, sink, request.first_block, blocks
            )
            await finish(reading)
            # The source closes the connection before it releases blocks that are still lent.
            if not channel.connection.quiet:
                raise ConnectionResetError("the source let go of the blocks while they were read")
            await channel.connection.send(Received())
        except BaseException:
            await finish(self._stop_reading(channel))
            raise
        self._channels.keep(channel)

    async def _stop_reading(self, channel: TransferChannel) -> None:
        try:
            async with asyncio.timeout(SETTLE_S):
                await channel.connection.send(Stop())
                usable = isinstance(await channel.connection.receive(), Stopped)
        except OSError:  # TimeoutError included
            usable = False
        if usable:
            self._channels.keep(channel)
        else:
            await self._channels.discard(channel)

    # --- either way ----------------------------------------------------------------------------

    async def _ask(
        self, address: str, request: Pull, end_grant: EndGrant
    ) -> tuple[TransferChannel, Granted]:
        """A channel on which the peer granted the request. Raises Refusal or OSError.

        `end_grant` ends a grant that arrives after the caller was cancelled.
        """
        while True:
            channel, reused = await self._channels.take(address)
            readable = channel.peer_blocks is not None
            if channel.gpu_to_gpu < request.on_gpu or readable < request.in_place:
                self._channels.keep(channel)
                raise ConnectionError("another peer took its place, with a GPU out of reach")
            asking = asyncio.create_task(
                self._channels.exchange(channel, request, self._endpoint.config.connect_s),
                name="kv-ask",
            )
            try:
                reply = await finish(asking)
            except asyncio.CancelledError:
                if asking.exception() is None and isinstance(asking.result(), Granted):
                    await finish(end_grant(channel))
                else:
                    await self._channels.discard(channel)
                raise
            except OSError as exc:
                await self._channels.discard(channel)
                if reused and isinstance(exc, ConnectionError):
                    continue  # it was lost while idle, which does not mean that the peer is gone
                raise
            if isinstance(reply, Granted):
                return channel, reply
            if isinstance(reply, Refused):
                self._channels.keep(channel)
                raise Refusal(reply.reason)
            await self._channels.discard(channel)
            raise ProtocolError("neither granted nor refused")
