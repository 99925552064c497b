"""The pulling half's transfer channels, kept open between pulls."""

from __future__ import annotations

import asyncio
import functools
from urllib.parse import urlsplit

from serving.framing import ProtocolError
from serving.kv_transfer.cancellation import finish
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.messages import WIRE_VERSION, ChannelHello, Message
from serving.kv_transfer.peer_memory import PeerMemory
from serving.kv_transfer.staging import StagingMemory
from serving.kv_transfer.transport import TransferChannel, TransferEndpoint, Unsettled

MAX_IDLE_CHANNELS = 8  # kept for each peer; a burst beyond that connects anew


class ChannelPool:
    """Connects to peers, and closes idle channels at once when their peer leaves."""

    def __init__(self, endpoint: TransferEndpoint, staging: StagingMemory) -> None:
        self._endpoint = endpoint
        self._memory = PeerMemory(
            endpoint.gpu,
            staging,
            can_stage=endpoint.transport.moves_gpu_memory,
            in_place=endpoint.config.in_place,
        )
        self._idle: dict[str, list[TransferChannel]] = {}
        self._closing: set[asyncio.Task[object]] = set()

    async def take(self, address: str) -> tuple[TransferChannel, bool]:
        """A channel to the peer at `address`, and whether it was used before.

        Raises ConnectionError. The caller hands the channel to `keep` or to `discard`.
        """
        while channels := self._idle.get(address):
            if not channels[-1].connection.quiet:
                self._close_idle(channels[-1])
                continue
            channel = channels.pop()
            channel.connection.watch(None)
            return channel, True
        connect_s = self._endpoint.config.connect_s
        deadline = asyncio.timeout(connect_s)
        try:
            async with deadline:
                return await self._connect(address), False
        except OSError as exc:
            reason = f"nothing within {connect_s:g} s" if deadline.expired() else exc
            raise ConnectionError(f"{address} not reached: {reason}") from exc

    def keep(self, channel: TransferChannel) -> None:
        """Keep a channel whose pull has ended well, for the next one."""
        channels = self._idle.setdefault(channel.address, [])
        channels.append(channel)
        channel.connection.watch(functools.partial(self._close_idle, channel))
        if len(channels) > MAX_IDLE_CHANNELS:
            self._close_idle(channels[0])

    async def discard(self, channel: TransferChannel) -> Unsettled:
        """Close a channel. Buffers that it used are free when the returned futures are done."""
        unsettled = await finish(channel.close())
        channel.connection.close()
        return unsettled

    async def exchange(
        self, channel: TransferChannel, request: Message, deadline_s: float
    ) -> Message:
        """Send `request` and return the answer. Raises TimeoutError, or another OSError."""
        try:
            async with asyncio.timeout(deadline_s):
                await channel.connection.send(request)
                return await channel.connection.receive()
        except TimeoutError as exc:
            raise TimeoutError(f"no answer within {deadline_s:g} s") from exc

    async def memory_paths(self, address: str) -> tuple[bool, bool]:
        """Whether both GPUs can stage blocks, and whether this one can read the peer's in place."""
        if self._endpoint.gpu is None:
            return False, False
        if channels := self._idle.get(address):
            channel = channels[-1]
        else:
            channel, _ = await self.take(address)
            self.keep(channel)
        return channel.gpu_to_gpu, channel.peer_blocks is not None

    async def close(self) -> None:
        """Close all idle channels. The others belong to the pulls that took them."""
        channels = [channel for channels in self._idle.values() for channel in channels]
        self._idle.clear()
        for channel in channels:
            channel.connection.watch(None)
        for channel in channels:
            await self.discard(channel)
        await asyncio.gather(*self._closing)

    async def _connect(self, address: str) -> TransferChannel:
        connection = await ControlConnection.open(*self._host_and_port(address))
        try:
            transport = self._endpoint.transport
            await connection.send(
                ChannelHello(
                    WIRE_VERSION,
                    transport.scheme,
                    self._endpoint.transport_address,
                    self._memory.request,
                )
            )
            hello = await connection.receive()
            if not isinstance(hello, ChannelHello):
                raise ProtocolError("no hello")
            if (hello.version, hello.transport) != (WIRE_VERSION, transport.scheme):
                raise ProtocolError(f"it speaks {hello.transport} version {hello.version}")
            channel = transport.channel(connection, hello)
            channel.admit_peer()
            channel.address = address
            channel.peer_blocks = await self._memory.map_pool(address, hello.memory)
            channel.gpu_to_gpu = await self._memory.can_stage(address, hello.memory)
            return channel
        except BaseException:
            connection.close()
            raise

    def _host_and_port(self, address: str) -> tuple[str, int]:
        scheme = self._endpoint.transport.scheme
        try:
            parts = urlsplit(address)
            if parts.scheme == scheme and parts.hostname and parts.port:
                return parts.hostname, parts.port
        except ValueError:  # not a port
            pass
        raise ProtocolError(f"not an address of {scheme}")

    def _close_idle(self, channel: TransferChannel) -> None:
        """Close a surplus channel, or one whose peer has left. At once, because a channel keeps the
        peer's memory."""
        channels = self._idle[channel.address]
        channels.remove(channel)
        if not channels:
            del self._idle[channel.address]
        channel.connection.watch(None)
        closing = asyncio.create_task(self.discard(channel), name="kv-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
