"""Sends the chunks of one granted pull: gathers, sends in order, and stops when the peer asks for it."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque

from serving.framing import ProtocolError
from serving.kv_transfer.cancellation import finish, stop, wait_for_all
from serving.kv_transfer.contract import BlockSource
from serving.kv_transfer.messages import (
    Message,
    Pull,
    Received,
    Refusal,
    Refused,
    Stop,
    Stopped,
)
from serving.kv_transfer.staging_pool import Buffer
from serving.kv_transfer.transport import SETTLE_S, TransferChannel, TransferEndpoint

log = logging.getLogger(__name__)


class ChunkSender:
    """One pull on its way to the peer at the other end of `channel`."""

    def __init__(
        self,
        source: BlockSource,
        endpoint: TransferEndpoint,
        pull: Pull,
        chunks: list[tuple[int, int]],
        channel: TransferChannel,
    ) -> None:
        """`chunks` are as `chunk_ranges` returns them."""
        self._source, self._endpoint = source, endpoint
        self._pull, self._chunks, self._channel = pull, chunks, channel
        self._sends: list[asyncio.Task[None]] = []  # one for each chunk that was gathered

    async def run(self, buffers: list[Buffer], reply: asyncio.Task[Message]) -> bool:
        """Send the chunks by way of `buffers`. Returns whether the peer received them all.

        `reply` completes with the peer's next message. Raises Refusal when the source cannot read
        the blocks, OSError when the peer is gone.
        """
        sends = self._sends
        sending: asyncio.Task[None] | None = None
        try:
            if not reply.done():
                sending = asyncio.create_task(self._send(buffers), name="kv-send")
                await asyncio.wait({sending, reply}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    await sending
            message = await reply  # raises when the peer is gone
            if isinstance(message, Received) and sending and len(sends) == len(self._chunks):
                await sending  # the peer may know before this end that the last chunk arrived
                return True
            if not isinstance(message, Stop):
                raise ProtocolError(f"{message} after {len(sends)} of {len(self._chunks)} chunks")
            if sending:
                await stop([sending])
            await self._channel.connection.send(Stopped(len(sends)))
            async with asyncio.timeout(SETTLE_S):
                await wait_for_all(sends)
            return False
        finally:
            await stop([*sends, *([sending] if sending else [])])

    async def _send(self, buffers: list[Buffer]) -> None:
        """Gather into whatever buffers are free while earlier chunks travel."""
        gathers: deque[tuple[asyncio.Task[None], Buffer]] = deque()
        try:
            for index in range(len(self._chunks)):
                ahead = index + len(gathers)
                while ahead < min(len(self._chunks), index + len(buffers)):
                    if ahead >= len(buffers):
                        sent = self._sends[ahead - len(buffers)]
                        if gathers and not sent.done():
                            break
                        await wait_for_all([sent])
                    first, count = self._chunks[ahead]
                    num_bytes = count * self._endpoint.layout.block_bytes
                    data = buffers[ahead % len(buffers)][:num_bytes]
                    gathering = self._gather(first, data)
                    gathers.append((asyncio.create_task(gathering, name="kv-gather"), data))
                    ahead += 1
                gathered, data = gathers[0]
                try:
                    await gathered
                except Refusal as refusal:
                    await wait_for_all(self._sends)  # the peer reads it instead of the next chunk
                    await self._channel.connection.send(Refused(str(refusal)))
                    raise
                gathers.popleft()
                sending = self._channel.send(self._pull.tag, index, data)
                self._sends.append(asyncio.create_task(sending, name="kv-chunk"))
        finally:
            await stop(gathered for gathered, _ in gathers)
        await wait_for_all(self._sends)

    async def _gather(self, first: int, data: Buffer) -> None:
        """Raises Refusal, so that the peer learns that the source failed and not the transport."""
        request_id = self._pull.request_id
        read = functools.partial(self._source.read, request_id, first, data)
        try:
            await finish(asyncio.get_running_loop().run_in_executor(self._endpoint.threads, read))
        except KeyError:
            raise Refusal("released meanwhile") from None
        except Exception as exc:
            log.exception("cannot read the blocks of %s", request_id)
            raise Refusal(f"cannot read the blocks: {exc}") from exc
