"""The prefill side: listens, checks who asks for what, and sends exactly those blocks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections import deque

import numpy as np

from serving.kv_transfer.base import BlockSource
from serving.kv_transfer.link import SETTLE_S, Link, Side, all_of, finish, stop
from serving.kv_transfer.memory import Offers
from serving.kv_transfer.staging import Buffer
from serving.kv_transfer.wire import (
    MAX_BLOCKS_IN_PLACE,
    MAX_CHUNKS,
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
    socket_family,
)

Chunks = list[tuple[int, int]]

log = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
IN_PLACE = "cuda_ipc, in place"


class BlockServer:
    """Answers pulls from `source`. Nothing a peer sends ends more than its own connection."""

    def __init__(self, source: BlockSource, side: Side) -> None:
        self._source, self._side = source, side
        self._staging = side.staging()
        self._offers = Offers(
            side.gpu,
            self._staging,
            source.memory if side.gpu and side.in_place else None,
            can_stage=side.carrier.reaches_gpus,
        )
        self._listener: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def start(self, host: str) -> int:
        """Listen on `host`; returns the port."""
        self._listener = socket.create_server(
            (host, 0), family=socket_family(host), backlog=BACKLOG
        )
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        port: int = self._listener.getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end all connections; pulls under way fail on the other side."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await stop(self._serving)

    def _accept(self, listener: socket.socket) -> None:
        # A callback and not a task in `sock_accept`: cancelling that can lose a connection.
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as exc:
            log.warning("cannot accept a KV connection: %s", exc)
            self._pause_accepting(listener)
            return
        connection = Connection(sock)
        task = asyncio.create_task(self._serve(connection), name="kv-serve")
        self._serving.add(task)
        # Here and not in `_serve`, which never begins when it is cancelled early enough.
        task.add_done_callback(lambda _: connection.close())
        task.add_done_callback(self._serving.discard)

    def _pause_accepting(self, listener: socket.socket) -> None:
        """Out of descriptors, most likely: the listener stays readable and would spin."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def resume() -> None:
            if listener is self._listener:
                loop.add_reader(listener, self._accept, listener)

        loop.call_later(ACCEPT_PAUSE_S, resume)

    async def _serve(self, connection: Connection) -> None:
        link: Link | None = None
        try:
            async with asyncio.timeout(self._side.connect_s):
                link = await self._greet(connection)
            while True:
                # Between pulls a connection may idle for as long as the peer keeps it.
                request = await connection.receive()
                if isinstance(request, Follow):
                    await self._tell_progress(request, link)
                    continue
                async with asyncio.timeout(self._side.transfer_s):
                    await self._answer(request, link)
        except TimeoutError:
            log.warning("a KV connection was closed: it ran past its deadline")
        except (OSError, Refusal) as exc:
            log.debug("a KV connection ended: %s", exc)
        except Exception:
            log.exception("a KV connection was closed")
        finally:
            if link is not None:
                await finish(link.close())

    async def _greet(self, connection: Connection) -> Link:
        hello = await connection.receive()
        if not isinstance(hello, Hello):
            raise ProtocolError("no hello")
        memory = await self._offers.to(hello.memory)
        mine = Hello(WIRE_VERSION, self._side.carrier.scheme, self._side.endpoint, memory)
        await connection.send(mine)
        if (hello.version, hello.transport) != (mine.version, mine.transport):
            raise ProtocolError(f"the peer speaks {hello.transport} version {hello.version}")
        return self._side.carrier.link(connection, hello)

    async def _tell_progress(self, follow: Follow, link: Link) -> None:
        """Waits for as long as the prefill takes: its end, whatever it is, ends this too."""
        try:
            progress = await self._source.progress(follow.request_id, follow.nonce, follow.beyond)
        except (PermissionError, KeyError) as exc:
            await link.connection.send(Refused(_why(exc)))
            return
        await link.connection.send(Computed(*progress))

    async def _answer(self, pull: Message, link: Link) -> None:
        if not isinstance(pull, Pull):
            raise ProtocolError("no pull")
        try:
            chunk_blocks = self._admit(pull)
        except Refusal as refusal:
            await link.connection.send(Refused(str(refusal)))
            return
        if pull.in_place:
            await self._lend(pull, link.connection)
            return
        await link.open()
        await link.connection.send(Granted(chunk_blocks, link.route(pull.on_gpu)))
        chunks = chunk_ranges(pull.first_block, pull.num_blocks, chunk_blocks)
        # From before the wait for memory on: who left meanwhile is not sent anything.
        listening = asyncio.create_task(link.connection.receive(), name="kv-reply")
        try:
            depth = min(self._staging.depth(pull.on_gpu), len(chunks))
            async with self._staging.pool(pull.on_gpu).lease(depth) as lease:
                try:
                    received = await self._deliver(pull, chunks, lease.buffers, link, listening)
                except BaseException:
                    lease.quarantine(await finish(link.close()))
                    raise
        finally:
            await stop([listening])
        if received and not pull.more_follows:
            self._source.done(pull.request_id)

    async def _lend(self, pull: Pull, connection: Connection) -> None:
        """Keep the blocks as they are while the peer reads them."""
        with contextlib.ExitStack() as lending:
            try:
                lent = self._source.lend(pull.request_id, pull.first_block, pull.num_blocks)
                blocks = lending.enter_context(lent)
            except KeyError as exc:
                await connection.send(Refused(_why(exc)))
                return
            try:
                ids = np.array(blocks, "<i4").tobytes()
                await connection.send(Granted(pull.num_blocks, IN_PLACE, ids))
                reply = await connection.receive()
            except BaseException:
                # Before the blocks may change: a peer that still reads them looks at the
                # connection afterwards.
                connection.close()
                raise
        if isinstance(reply, Stop):
            await connection.send(Stopped(0))
        elif not isinstance(reply, Received):
            raise ProtocolError(f"{reply} in the place of received")
        elif not pull.more_follows:
            self._source.done(pull.request_id)

    async def _deliver(
        self,
        pull: Pull,
        chunks: Chunks,
        buffers: list[Buffer],
        link: Link,
        listening: asyncio.Task[Message],
    ) -> bool:
        """Send `chunks`, unless the peer stops it; whether it has them all."""
        sends: list[asyncio.Task[None]] = []
        sending: asyncio.Task[None] | None = None
        try:
            if not listening.done():
                sending = asyncio.create_task(
                    self._send(pull, chunks, buffers, link, sends), name="kv-send"
                )
                await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    await sending
            reply = await listening  # raises when the peer is gone
            if isinstance(reply, Received) and sending and len(sends) == len(chunks):
                await sending  # the peer can know sooner than this side that the last one arrived
                return True
            if not isinstance(reply, Stop):
                raise ProtocolError(f"{reply} after {len(sends)} of {len(chunks)} chunks")
            if sending:
                await stop([sending])
            await link.connection.send(Stopped(len(sends)))
            async with asyncio.timeout(SETTLE_S):
                await all_of(sends)
            return False
        finally:
            await stop([*sends, *([sending] if sending else [])])

    def _admit(self, pull: Pull) -> int:
        """Blocks per chunk. Raises Refusal."""
        if pull.layout != self._side.layout.fingerprint:
            raise Refusal(f"layout {pull.layout} asked for, {self._side.layout.fingerprint} held")
        try:
            held = self._source.open(pull.request_id, pull.nonce)
        except (PermissionError, KeyError) as exc:
            raise Refusal(_why(exc)) from None
        if not 0 <= pull.first_block <= pull.first_block + pull.num_blocks <= held:
            raise Refusal(
                f"{pull.num_blocks} blocks from {pull.first_block} on asked for, {held} held"
            )
        if pull.in_place:
            if not self._offers.has_pool or not 0 < pull.num_blocks <= MAX_BLOCKS_IN_PLACE:
                raise Refusal("these blocks were not offered in place")
            return pull.num_blocks
        if pull.on_gpu and not self._staging.has_gpu:
            raise Refusal("no GPU memory was offered here")
        mine = self._staging.chunk_blocks(pull.on_gpu, pull.num_blocks)
        chunk_blocks = min(pull.chunk_blocks, mine)
        if chunk_blocks < 1 or pull.num_blocks > chunk_blocks * MAX_CHUNKS:
            raise Refusal(f"chunks of {chunk_blocks} blocks")
        return chunk_blocks

    async def _send(
        self,
        pull: Pull,
        chunks: Chunks,
        buffers: list[Buffer],
        link: Link,
        sends: list[asyncio.Task[None]],
    ) -> None:
        """Gather into whatever buffers are free while chunks travel, and send in order; `sends`
        grows by a task for each chunk."""
        gathers: deque[tuple[asyncio.Task[None], Buffer]] = deque()
        try:
            for index in range(len(chunks)):
                ahead = index + len(gathers)
                while ahead < min(len(chunks), index + len(buffers)):
                    if ahead >= len(buffers):
                        sent = sends[ahead - len(buffers)]
                        if gathers and not sent.done():
                            break
                        await all_of([sent])
                    first, count = chunks[ahead]
                    data = buffers[ahead % len(buffers)][: count * self._side.layout.block_bytes]
                    gather = self._gather(pull.request_id, first, data)
                    gathers.append((asyncio.create_task(gather, name="kv-gather"), data))
                    ahead += 1
                gathered, data = gathers[0]
                try:
                    await gathered
                except Refusal as refusal:
                    await all_of(sends)  # the refusal comes in the place of the next chunk
                    await link.connection.send(Refused(str(refusal)))
                    raise
                gathers.popleft()
                sends.append(asyncio.create_task(link.send(pull.tag, index, data), name="kv-chunk"))
        finally:
            await stop(gathered for gathered, _ in gathers)
        await all_of(sends)

    async def _gather(self, request_id: str, first: int, data: Buffer) -> None:
        """Raises Refusal: that it is the source that gave up, not the way, is worth telling."""
        read = functools.partial(self._source.read, request_id, first, data)
        try:
            await finish(asyncio.get_running_loop().run_in_executor(self._side.threads, read))
        except KeyError:
            raise Refusal("released meanwhile") from None
        except Exception as exc:
            log.exception("cannot read the blocks of %s", request_id)
            raise Refusal(f"cannot read the blocks: {exc}") from exc


def _why(exc: PermissionError | KeyError) -> str:
    return "wrong nonce" if isinstance(exc, PermissionError) else "not held here (any more)"
