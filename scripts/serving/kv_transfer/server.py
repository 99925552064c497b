"""The prefill half: listens, checks each request, and delivers exactly the blocks asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import numpy as np

from serving.framing import ProtocolError
from serving.kv_transfer.cancellation import finish, stop
from serving.kv_transfer.contract import BlockSource
from serving.kv_transfer.control import ControlConnection, socket_family
from serving.kv_transfer.messages import (
    MAX_BLOCKS_IN_PLACE,
    MAX_CHUNKS,
    WIRE_VERSION,
    ChannelHello,
    Computed,
    Follow,
    Granted,
    Message,
    Pull,
    Received,
    Refusal,
    Refused,
    Stop,
    Stopped,
    chunk_ranges,
)
from serving.kv_transfer.peer_memory import MemoryOffers
from serving.kv_transfer.sender import ChunkSender
from serving.kv_transfer.staging import StagingMemory
from serving.kv_transfer.transport import TransferChannel, TransferEndpoint

log = logging.getLogger(__name__)

BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
IN_PLACE_ROUTE = "cuda_ipc, in place"


class BlockServer:
    """Answers pulls from `source`. Whatever a peer sends can end only its own connection."""

    def __init__(self, source: BlockSource, endpoint: TransferEndpoint) -> None:
        self._source, self._endpoint = source, endpoint
        self._staging = StagingMemory.for_endpoint(endpoint)
        self._offers = MemoryOffers(
            endpoint.gpu,
            self._staging,
            source.memory if endpoint.gpu and endpoint.config.in_place else None,
            can_stage=endpoint.transport.moves_gpu_memory,
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
        """Stop listening and end all connections; peers' pulls fail."""
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
        connection = ControlConnection(sock)
        task = asyncio.create_task(self._serve(connection), name="kv-serve")
        self._serving.add(task)
        # Here and not in `_serve`, which never begins when it is cancelled early enough.
        task.add_done_callback(lambda _: connection.close())
        task.add_done_callback(self._serving.discard)

    def _pause_accepting(self, listener: socket.socket) -> None:
        """No descriptors are left, most likely. The listener stays readable and would spin."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def resume() -> None:
            if listener is self._listener:
                loop.add_reader(listener, self._accept, listener)

        loop.call_later(ACCEPT_PAUSE_S, resume)

    async def _serve(self, connection: ControlConnection) -> None:
        channel: TransferChannel | None = None
        try:
            async with asyncio.timeout(self._endpoint.config.connect_s):
                channel = await self._greet(connection)
            while True:
                # Between pulls a connection may idle for as long as the peer keeps it.
                request = await connection.receive()
                if isinstance(request, Follow):
                    await self._report_progress(request, connection)
                    continue
                async with asyncio.timeout(self._endpoint.config.transfer_s):
                    await self._answer(request, channel)
        except TimeoutError:
            log.warning("a KV connection was closed: it ran past its deadline")
        except (OSError, Refusal) as exc:
            log.debug("a KV connection ended: %s", exc)
        except Exception:
            log.exception("a KV connection was closed")
        finally:
            if channel is not None:
                await finish(channel.close())

    async def _greet(self, connection: ControlConnection) -> TransferChannel:
        hello = await connection.receive()
        if not isinstance(hello, ChannelHello):
            raise ProtocolError("no hello")
        transport = self._endpoint.transport
        memory = await self._offers.answer(hello.memory)
        mine = ChannelHello(
            WIRE_VERSION, transport.scheme, self._endpoint.transport_address, memory
        )
        await connection.send(mine)
        if (hello.version, hello.transport) != (mine.version, mine.transport):
            raise ProtocolError(f"the peer speaks {hello.transport} version {hello.version}")
        return transport.channel(connection, hello)

    async def _report_progress(self, follow: Follow, connection: ControlConnection) -> None:
        """Waits for as long as the prefill takes. When the prefill ends, in any way, so does this."""
        try:
            progress = await self._source.progress(follow.request_id, follow.nonce, follow.beyond)
        except (PermissionError, KeyError) as exc:
            await connection.send(Refused(_reason(exc)))
            return
        await connection.send(Computed(*progress))

    async def _answer(self, pull: Message, channel: TransferChannel) -> None:
        if not isinstance(pull, Pull):
            raise ProtocolError("no pull")
        try:
            chunk_blocks = self._check(pull)
        except Refusal as refusal:
            await channel.connection.send(Refused(str(refusal)))
            return
        if pull.in_place:
            received = await self._lend(pull, channel.connection)
        else:
            received = await self._deliver(pull, chunk_blocks, channel)
        if received and not pull.more_follows:
            self._source.done(pull.request_id)

    def _check(self, pull: Pull) -> int:
        """Blocks in a chunk. Raises Refusal when the peer may not have these blocks."""
        if pull.layout != self._endpoint.layout.fingerprint:
            held_layout = self._endpoint.layout.fingerprint
            raise Refusal(f"layout {pull.layout} asked for, {held_layout} held")
        try:
            held = self._source.open(pull.request_id, pull.nonce)
        except (PermissionError, KeyError) as exc:
            raise Refusal(_reason(exc)) from None
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

    async def _deliver(self, pull: Pull, chunk_blocks: int, channel: TransferChannel) -> bool:
        """Send the blocks through staging memory. Returns whether the peer has them all."""
        await channel.open()
        await channel.connection.send(Granted(chunk_blocks, channel.route(pull.on_gpu)))
        chunks = chunk_ranges(pull.first_block, pull.num_blocks, chunk_blocks)
        # Listening starts before the wait for memory, so that a peer that left gets nothing sent.
        reply = asyncio.create_task(channel.connection.receive(), name="kv-reply")
        try:
            depth = min(self._staging.depth(pull.on_gpu), len(chunks))
            async with self._staging.pool(pull.on_gpu).borrow(depth) as borrowed:
                sender = ChunkSender(self._source, self._endpoint, pull, chunks, channel)
                try:
                    return await sender.run(borrowed.buffers, reply)
                except BaseException:
                    borrowed.quarantine(await finish(channel.close()))
                    raise
        finally:
            await stop([reply])

    async def _lend(self, pull: Pull, connection: ControlConnection) -> bool:
        """Keep the blocks unchanged while the peer reads them. Returns whether it has them all."""
        with contextlib.ExitStack() as lending:
            try:
                lent = self._source.lend(pull.request_id, pull.first_block, pull.num_blocks)
                blocks = lending.enter_context(lent)
            except KeyError as exc:
                await connection.send(Refused(_reason(exc)))
                return False
            try:
                ids = np.array(blocks, "<i4").tobytes()
                await connection.send(Granted(pull.num_blocks, IN_PLACE_ROUTE, ids))
                reply = await connection.receive()
            except BaseException:
                # Before the blocks may change: a peer that still reads them checks the connection
                # afterwards.
                connection.close()
                raise
        if isinstance(reply, Received):
            return True
        if not isinstance(reply, Stop):
            raise ProtocolError(f"{reply} instead of received")
        await connection.send(Stopped(0))
        return False


def _reason(exc: PermissionError | KeyError) -> str:
    return "wrong nonce" if isinstance(exc, PermissionError) else "not held here (any more)"
