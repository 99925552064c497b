"""KV blocks over plain TCP, on the control connection itself: the transport that always works."""

from __future__ import annotations

import asyncio

from serving.framing import ProtocolError
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.messages import ChannelHello, InlineChunk, Refusal, Refused
from serving.kv_transfer.staging_pool import Buffer
from serving.kv_transfer.transport import TransferChannel, Transport, Unsettled


class TcpChannel(TransferChannel):
    """One chunk after the other: a message that names it, then its bytes."""

    def __init__(self, connection: ControlConnection) -> None:
        super().__init__(connection)
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()  # both serve in order

    async def open(self) -> None:
        """The control connection is open already."""

    def route(self, on_gpu: bool) -> str:
        return "tcp"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        async with self._sending:
            await self.connection.send(InlineChunk(index))
            assert not isinstance(data, GpuBuffer), "this transport moves no GPU memory"
            await self.connection.send_bytes(data.data)

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        async with self._receiving:
            message = await self.connection.receive()
            if isinstance(message, Refused):
                raise Refusal(message.reason)
            if message != InlineChunk(index):
                raise ProtocolError(f"{message} instead of chunk {index}")
            assert not isinstance(data, GpuBuffer), "this transport moves no GPU memory"
            await self.connection.receive_into(data.data)

    async def finished(self) -> None:
        """Nothing reads ahead."""

    async def stop_receiving(self, tag: int, scratch: Buffer) -> bool:
        return False  # closing is cheaper than reading chunks that nobody wants

    async def close(self) -> Unsettled:
        return ()  # a cancelled socket call no longer touches its buffer


class TcpTransport(Transport):
    scheme = "tcp"

    def __init__(self, host: str = "", device: str = "cpu") -> None:
        """Needs neither."""

    async def start(self) -> bytes:
        return b""

    def channel(self, connection: ControlConnection, peer: ChannelHello) -> TransferChannel:
        return TcpChannel(connection)

    async def close(self) -> None:
        """Holds nothing."""
