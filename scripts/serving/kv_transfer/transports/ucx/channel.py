"""The UCX messages of one pull at a time. The source sends, the puller receives by tag."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from serving.framing import ProtocolError
from serving.kv_transfer.cancellation import stop
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.messages import ChannelHello, Message, Refusal, Refused, Stop, Stopped
from serving.kv_transfer.staging_pool import Buffer
from serving.kv_transfer.transport import SETTLE_S, TransferChannel, Unsettled
from serving.kv_transfer.transports.ucx.context import UcxMessage
from serving.kv_transfer.transports.ucx.endpoints import UcxEndpoints
from serving.kv_transfer.transports.ucx.lanes import lanes
from serving.kv_transfer.transports.ucx.options import GPU_TRANSPORTS, UcxAddress

_decode_address = msgspec.msgpack.Decoder(UcxAddress).decode


class UcxChannel(TransferChannel):
    def __init__(
        self, connection: ControlConnection, endpoints: UcxEndpoints, peer: ChannelHello
    ) -> None:
        """Raises ProtocolError when the peer's hello has no UCX address."""
        super().__init__(connection)
        self._endpoints, self._ucx = endpoints, endpoints.context
        try:
            self._peer = _decode_address(peer.endpoint)
        except msgspec.MsgspecError as exc:
            raise ProtocolError(f"no UCX address: {exc}") from None
        self._endpoint: Any = None
        self._sends: set[UcxMessage] = set()
        self._receives: dict[UcxMessage, int] = {}  # with the index of the chunk
        self._num_expected = 0
        self._tag = 0
        self._reply: asyncio.Task[Message] | None = None

    def admit_peer(self) -> None:
        self._ucx.port.admit([self.connection.peer_host, *self._peer.hosts])

    async def open(self) -> None:
        self.admit_peer()
        self._endpoint = await self._endpoints.get(self._peer.worker)

    def route(self, on_gpu: bool) -> str:
        names = {lane.split("/")[0] for lane in lanes(self._endpoint.ucp_endpoint)}
        if on_gpu and "cuda_ipc" in names:
            return "cuda_ipc"
        return ",".join(sorted(names - GPU_TRANSPORTS - {"self"} or names)) or "ucx"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        endpoint = self._endpoint
        message = self._ucx.post_send(endpoint, tag + index, data)
        self._sends.add(message)
        message.add_done_callback(self._settled)
        await self._ucx.outcome(message)
        # When the loss of the endpoint cancels a send, ucxx returns as if the send had succeeded.
        if endpoint.closed:
            raise ConnectionResetError("the UCX endpoint was lost")

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        self._tag, self._num_expected = tag, index + 1
        message = self._post_receive(index, data)
        reply = self._listen()
        await asyncio.wait({message, reply}, return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            answer = reply.result()  # raises when the peer is gone
            if isinstance(answer, Refused):
                raise Refusal(answer.reason)
            raise ProtocolError(str(answer))
        await self._ucx.outcome(message)

    async def finished(self) -> None:
        self._num_expected = 0
        if self._reply:
            reply, self._reply = self._reply, None
            await stop([reply])

    async def stop_receiving(self, tag: int, scratch: Buffer) -> bool:
        self._tag = tag
        reply = self._listen()
        if reply.done():
            return False
        try:
            async with asyncio.timeout(SETTLE_S):
                await self.connection.send(Stop())
                stopped = await reply
                if not isinstance(stopped, Stopped):
                    return False
                self._satisfy(stopped.num_chunks)
                if self._receives:
                    await asyncio.wait(self._receives)
                for index in range(self._num_expected, stopped.num_chunks):
                    await self._ucx.outcome(self._post_receive(index, scratch))
        except OSError:  # TimeoutError included
            return False
        await self.finished()
        return True

    async def close(self) -> Unsettled:
        await self.finished()
        self._satisfy(0)
        unsettled = await _unsettled({*self._sends, *self._receives})
        if self._sends:
            await self._endpoints.close_one(self._endpoint)  # also ends other pulls' messages
            unsettled = await _unsettled(unsettled)
        self._endpoints.adopt(unsettled)
        return unsettled

    def _listen(self) -> asyncio.Task[Message]:
        """The source's next message: it comes when the source refuses, or has stopped."""
        if self._reply is None:
            self._reply = asyncio.create_task(self.connection.receive(), name="kv-reply")
        return self._reply

    def _post_receive(self, index: int, data: Buffer) -> UcxMessage:
        message = self._ucx.post_receive(self._tag + index, data)
        self._receives[message] = index
        message.add_done_callback(self._settled)
        return message

    def _satisfy(self, num_chunks: int) -> None:
        """End the receives of chunks from `num_chunks` on, which will not come."""
        for index in self._receives.values():
            if index >= num_chunks:
                self._ucx.satisfy(self._tag + index)

    def _settled(self, message: UcxMessage) -> None:
        self._sends.discard(message)
        self._receives.pop(message, None)
        if not message.cancelled():
            message.exception()  # after a failure nobody else may retrieve it


async def _unsettled(messages: set[UcxMessage]) -> set[UcxMessage]:
    """Those that do not end within SETTLE_S."""
    return (await asyncio.wait(messages, timeout=SETTLE_S))[1] if messages else set()
