"""KV blocks over plain TCP, on the control connection itself: the transport that always works."""

from __future__ import annotations

import asyncio

from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.link import Carrier, Link
from serving.kv_transfer.staging import Buffer, Unsettled
from serving.kv_transfer.transfer import LinkedTransfer
from serving.kv_transfer.wire import Chunk, Connection, Hello, ProtocolError, Refusal, Refused


class TcpLink(Link):
    """One chunk after the other: a frame that names it, then its bytes."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()  # both serve in order

    async def open(self) -> None:
        """The connection is the way."""

    def route(self, on_gpu: bool) -> str:
        return "tcp"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        async with self._sending:
            await self.connection.send(Chunk(index))
            assert not isinstance(data, GpuBuffer), "a carrier that reaches no GPU"
            await self.connection.send_bytes(data.data)

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        async with self._receiving:
            message = await self.connection.receive()
            if isinstance(message, Refused):
                raise Refusal(message.reason)
            if message != Chunk(index):
                raise ProtocolError(f"{message} instead of chunk {index}")
            assert not isinstance(data, GpuBuffer), "a carrier that reaches no GPU"
            await self.connection.receive_into(data.data)

    async def finished(self) -> None:
        """Nothing reads ahead."""

    async def give_up(self, tag: int, scratch: Buffer) -> bool:
        return False  # closing is cheaper than reading what was sent for nothing

    async def close(self) -> Unsettled:
        return ()  # a cancelled socket call touches its buffer no more


class TcpCarrier(Carrier):
    scheme = "tcp"

    async def start(self) -> bytes:
        return b""

    def link(self, connection: Connection, peer: Hello) -> Link:
        return TcpLink(connection)

    async def close(self) -> None:
        """Holds nothing."""


class TcpTransfer(LinkedTransfer):
    """See `KvTransfer`."""

    def _carrier(self) -> Carrier:
        return TcpCarrier()
