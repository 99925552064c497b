"""The decode side: asks a peer for blocks and hands them on as they arrive."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import msgspec
import numpy as np

from serving.errors import KvTransferFailed
from serving.kv_layout import BlocksInPlace
from serving.kv_transfer.base import ChunkSink, Progress
from serving.kv_transfer.link import SETTLE_S, Link, Side, finish, stop
from serving.kv_transfer.memory import Reach
from serving.kv_transfer.staging import Buffer, Lease
from serving.kv_transfer.wire import (
    MAX_BLOCKS_IN_PLACE,
    WIRE_VERSION,
    Computed,
    Connection,
    Follow,
    Granted,
    Hello,
    Message,
    ProtocolError,
    Pull,
    Received,
    Refusal,
    Refused,
    Stop,
    Stopped,
    chunk_ranges,
)
from serving.protocol import KvTransferParams

MAX_IDLE_LINKS = 8  # kept per peer; a burst beyond that connects anew


class Puller:
    """Pulls blocks over links that are kept between pulls."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._staging = side.staging()
        self._reach = Reach(
            side.gpu,
            self._staging,
            can_stage=side.carrier.reaches_gpus,
            in_place=side.in_place,
        )
        self.route = ""
        self._idle: dict[str, list[Link]] = {}
        self._leaving: set[asyncio.Task[object]] = set()
        self._running: set[asyncio.Timeout] = set()
        self._none_running = asyncio.Event()
        self._none_running.set()
        self._closed = False
        # Random above: what an earlier process or a failed pull left on the way is never taken
        # for a chunk of this one.
        self._tags = itertools.count(secrets.randbits(39) << 24, 1 << 24)

    async def progress(self, params: KvTransferParams, beyond: int, within_s: float) -> Progress:
        """See `KvTransfer.progress`."""
        follow = Follow(params.request_id, params.nonce, beyond)
        async with self._bounded(params, within_s):
            while True:
                link, reused = await self._take(params.address)
                try:
                    reply = await self._exchange(link, follow, within_s)
                except BaseException as exc:
                    await finish(self._discard(link))
                    if reused and isinstance(exc, ConnectionError):
                        continue  # it ended while idle
                    raise
                break
            self._keep(params.address, link)
            if isinstance(reply, Computed):
                return Progress(reply.num_blocks, reply.token)
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
            layout=self._side.layout.fingerprint,
            first_block=first_block,
            num_blocks=num_blocks,
            chunk_blocks=1,
            tag=next(self._tags),
            more_follows=more_follows,
        )
        async with self._bounded(params, self._side.transfer_s):
            await self._pull(params.address, request, sink)
        return num_blocks * self._side.layout.block_bytes

    @asynccontextmanager
    async def _bounded(self, params: KvTransferParams, within_s: float) -> AsyncIterator[None]:
        """Something asked of a peer: ends in time, when this side closes, and fails in one way."""
        failed = functools.partial(KvTransferFailed, params.request_id, params.source_instance)
        if self._closed:
            raise failed("this side is closed")
        if params.layout != self._side.layout.fingerprint:
            raise failed(f"its layout is {params.layout}, ours {self._side.layout.fingerprint}")
        deadline = asyncio.timeout(within_s)
        self._running.add(deadline)
        self._none_running.clear()
        try:
            async with deadline:
                yield
        except TimeoutError as exc:
            why = f"not complete within {within_s:g} s"
            if self._closed:
                why = "this side was closed"
            elif not deadline.expired():
                why = str(exc) or "timed out"
            raise failed(why) from exc
        except (OSError, Refusal) as exc:
            raise failed(str(exc) or type(exc).__name__) from exc
        finally:
            self._running.discard(deadline)
            if not self._running:
                self._none_running.set()

    async def close(self) -> None:
        """Fail what is under way, then close every link."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for deadline in self._running:
            if not deadline.expired():
                deadline.reschedule(now)
        await self._none_running.wait()
        links = [link for links in self._idle.values() for link in links]
        self._idle.clear()
        for link in links:
            link.connection.watch(None)
        for link in links:
            await self._discard(link)
        await asyncio.gather(*self._leaving)

    async def _pull(self, address: str, request: Pull, sink: ChunkSink) -> None:
        on_gpu, in_place = await self._ways(address) if request.num_blocks else (False, False)
        if in_place:
            end = request.first_block + request.num_blocks
            pieces = chunk_ranges(request.first_block, request.num_blocks, MAX_BLOCKS_IN_PLACE)
            for first, count in pieces:
                piece = msgspec.structs.replace(
                    request,
                    first_block=first,
                    num_blocks=count,
                    in_place=True,
                    more_follows=request.more_follows or first + count < end,
                )
                await self._read_in_place(address, piece, sink)
            return
        chunk_blocks = self._staging.chunk_blocks(on_gpu, request.num_blocks)
        request = msgspec.structs.replace(request, chunk_blocks=chunk_blocks, on_gpu=on_gpu)
        depth = min(self._staging.depth(on_gpu), -(-request.num_blocks // chunk_blocks))
        async with self._staging.pool(on_gpu).lease(depth) as lease:
            give_up = functools.partial(self._give_up, address, request, lease)
            link, granted = await self._ask(address, request, give_up)
            self.route = granted.route
            try:
                await self._fetch(link, request, granted, lease.buffers, sink)
                await link.connection.send(Received())
            except BaseException:
                await finish(give_up(link))
                raise
            self._keep(address, link)

    async def _read_in_place(self, address: str, request: Pull, sink: ChunkSink) -> None:
        """Hand all blocks on where they are, in the source's pool. At most MAX_BLOCKS_IN_PLACE."""
        give_up = functools.partial(self._stop_reading, address)
        link, granted = await self._ask(address, request, give_up)
        self.route = granted.route
        try:
            block_ids = np.frombuffer(granted.blocks, "<i4")
            if len(block_ids) != request.num_blocks or link.pool is None:
                raise ProtocolError(f"{len(block_ids)} blocks in place of {request.num_blocks}")
            num_bytes = request.num_blocks * self._side.layout.block_bytes
            blocks = BlocksInPlace(link.pool.address, block_ids, num_bytes, link.pool)
            reading = asyncio.get_running_loop().run_in_executor(
                self._side.threads, sink, request.first_block, blocks
            )
            await finish(reading)
            # The source closes before it lets blocks go that were not received yet.
            if not link.connection.quiet:
                raise ConnectionResetError("the source let go of the blocks while they were read")
            await link.connection.send(Received())
        except BaseException:
            await finish(give_up(link))
            raise
        self._keep(address, link)

    async def _stop_reading(self, address: str, link: Link) -> None:
        """After a grant of blocks in place, when they are not (all) wanted."""
        try:
            async with asyncio.timeout(SETTLE_S):
                await link.connection.send(Stop())
                usable = isinstance(await link.connection.receive(), Stopped)
        except OSError:  # a deadline is one, too
            usable = False
        if usable:
            self._keep(address, link)
        else:
            await self._discard(link)

    async def _give_up(self, address: str, request: Pull, lease: Lease, link: Link) -> None:
        """After a grant, when not everything arrived or was wanted."""
        if lease.buffers and await link.give_up(request.tag, lease.buffers[0]):
            self._keep(address, link)
        else:
            lease.quarantine(await self._discard(link))

    async def _fetch(
        self, link: Link, request: Pull, granted: Granted, buffers: list[Buffer], sink: ChunkSink
    ) -> None:
        """Scatter chunk k while chunk k + 1 arrives."""
        if not 1 <= granted.chunk_blocks <= request.chunk_blocks:
            raise ProtocolError(f"chunks of {granted.chunk_blocks} blocks")
        chunks = chunk_ranges(request.first_block, request.num_blocks, granted.chunk_blocks)
        loop = asyncio.get_running_loop()
        arriving: deque[tuple[asyncio.Task[None], Buffer]] = deque()
        try:
            for index, (_, count) in enumerate(chunks[: len(buffers)]):
                arriving.append(self._expect(link, request.tag, index, buffers[index], count))
            for index, (first, _) in enumerate(chunks):
                arrival, data = arriving[0]
                await arrival
                await finish(loop.run_in_executor(self._side.threads, sink, first, data))
                arriving.popleft()
                following = index + len(buffers)
                if following < len(chunks):
                    buffer, count = buffers[index % len(buffers)], chunks[following][1]
                    arriving.append(self._expect(link, request.tag, following, buffer, count))
        finally:
            await stop(arrival for arrival, _ in arriving)
        await link.finished()

    def _expect(
        self, link: Link, tag: int, index: int, buffer: Buffer, count: int
    ) -> tuple[asyncio.Task[None], Buffer]:
        data = buffer[: count * self._side.layout.block_bytes]
        return asyncio.create_task(link.receive(tag, index, data), name="kv-receive"), data

    async def _ask(
        self, address: str, request: Pull, give_up: Callable[[Link], Awaitable[None]]
    ) -> tuple[Link, Granted]:
        """A link on which the peer granted the request. Raises Refusal or OSError."""
        while True:
            link, reused = await self._take(address)
            if link.on_gpu < request.on_gpu or (link.pool is not None) < request.in_place:
                self._keep(address, link)
                raise ConnectionError("another peer, whose GPU is out of reach, took its place")
            asking = asyncio.create_task(
                self._exchange(link, request, self._side.connect_s), name="kv-ask"
            )
            try:
                reply = await finish(asking)
            except asyncio.CancelledError:
                if asking.exception() is None and isinstance(asking.result(), Granted):
                    await finish(give_up(link))
                else:
                    await self._discard(link)
                raise
            except OSError as exc:
                await self._discard(link)
                if reused and isinstance(exc, ConnectionError):
                    continue  # it ended while idle, which says nothing about the peer
                raise
            if isinstance(reply, Granted):
                return link, reply
            if isinstance(reply, Refused):
                self._keep(address, link)
                raise Refusal(reply.reason)
            await self._discard(link)
            raise ProtocolError("neither granted nor refused")

    async def _exchange(self, link: Link, request: Message, within_s: float) -> Message:
        try:
            async with asyncio.timeout(within_s):
                await link.connection.send(request)
                return await link.connection.receive()
        except TimeoutError as exc:
            raise TimeoutError(f"no answer within {within_s:g} s") from exc

    async def _ways(self, address: str) -> tuple[bool, bool]:
        """Whether blocks can be staged on both GPUs, and whether they can be read in place; a link
        to the peer knows."""
        if self._side.gpu is None:
            return False, False
        if not (links := self._idle.get(address)):
            link, _ = await self._take(address)
            self._keep(address, link)
            links = [link]
        return links[-1].on_gpu, links[-1].pool is not None

    async def _take(self, address: str) -> tuple[Link, bool]:
        """A link to the peer, and whether it was used before."""
        while links := self._idle.get(address):
            if not links[-1].connection.quiet:
                self._leave(address, links[-1])
                continue
            link = links.pop()
            link.connection.watch(None)
            return link, True
        deadline = asyncio.timeout(self._side.connect_s)
        try:
            async with deadline:
                return await self._connect(address), False
        except OSError as exc:
            why = f"nothing within {self._side.connect_s:g} s" if deadline.expired() else exc
            raise ConnectionError(f"{address} not reached: {why}") from exc

    async def _connect(self, address: str) -> Link:
        connection = await Connection.open(*self._host_and_port(address))
        try:
            carrier, memory = self._side.carrier, self._reach.mine
            await connection.send(Hello(WIRE_VERSION, carrier.scheme, self._side.endpoint, memory))
            hello = await connection.receive()
            if not isinstance(hello, Hello):
                raise ProtocolError("no hello")
            if (hello.version, hello.transport) != (WIRE_VERSION, carrier.scheme):
                raise ProtocolError(f"it speaks {hello.transport} version {hello.version}")
            link = carrier.link(connection, hello)
            link.let_in()
            link.pool = await self._reach.pool(address, hello.memory)
            link.on_gpu = await self._reach.includes(address, hello.memory)
            return link
        except BaseException:
            connection.close()
            raise

    def _host_and_port(self, address: str) -> tuple[str, int]:
        scheme = self._side.carrier.scheme
        try:
            parts = urlsplit(address)
            if parts.scheme == scheme and parts.hostname and parts.port:
                return parts.hostname, parts.port
        except ValueError:  # a port that is none
            pass
        raise ProtocolError(f"not an address of {scheme}")

    def _keep(self, address: str, link: Link) -> None:
        links = self._idle.setdefault(address, [])
        links.append(link)
        link.connection.watch(functools.partial(self._leave, address, link))
        if len(links) > MAX_IDLE_LINKS:
            self._leave(address, links[0])

    def _leave(self, address: str, link: Link) -> None:
        """Close an idle link: one too many, or its peer left. That is done at once, because the
        link keeps the peer's memory."""
        links = self._idle[address]
        links.remove(link)
        if not links:
            del self._idle[address]
        link.connection.watch(None)
        leaving = asyncio.create_task(self._discard(link), name="kv-leave")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _discard(self, link: Link) -> list[asyncio.Future[object]]:
        unsettled = await finish(link.close())
        link.connection.close()
        return list(unsettled)
