"""What a transport must do: move the chunks of one pull beside a control connection.

`BlockServer` (server.py) and `Puller` (puller.py) speak over control connections and stage blocks,
whatever the transport. A new transport implements `Transport` and `TransferChannel` in one module
of `transports/`, and gets one entry in the table there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from serving.config import KvTransferConfig
from serving.kv_layout import KvLayout
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.gpu_memory import CudaDevice, Mapping
from serving.kv_transfer.messages import ChannelHello
from serving.kv_transfer.staging_pool import Buffer

SETTLE_S = 1.0  # deadline for messages that are under way when a transfer fails

Unsettled = Collection[asyncio.Future[Any]]
"""Operations of a transport that still touch buffers; a buffer is free when all are done."""


class TransferChannel(ABC):
    """Moves the blocks of one control connection, for one pull at a time.

    Every failure of the transport or of the peer is a ConnectionError (or another OSError). A
    refusal that arrives instead of a chunk is a Refusal. After either, only `close` makes sense.
    """

    address = ""
    """Where the peer listens. On the pulling half only."""

    gpu_to_gpu = False
    """Whether both ends can stage in GPU memory that the other one reaches. Pulling half only."""

    peer_blocks: Mapping | None = None
    """The peer's pool, where this process can read blocks in place. Pulling half only."""

    def __init__(self, connection: ControlConnection) -> None:
        self.connection = connection

    def admit_peer(self) -> None:  # noqa: B027, most transports have no port of their own
        """Let the peer reach this worker's transport, because this worker pulls from it."""

    @abstractmethod
    async def open(self) -> None:
        """Get ready to send. Called before each pull, after the peer has proved its nonce."""

    @abstractmethod
    def route(self, on_gpu: bool) -> str:
        """How the blocks travel, for people to read. Called on the sending half, after `open`."""

    @abstractmethod
    async def send(self, tag: int, index: int, data: Buffer) -> None:
        """Send chunk `index`. Several sends may run at once; they start in order.

        Returns when the transport no longer needs `data`. After a cancellation, `close` says when
        `data` is free.
        """

    @abstractmethod
    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        """Receive chunk `index` into all of `data`. Concurrency and cancellation as for `send`."""

    @abstractmethod
    async def finished(self) -> None:
        """All chunks have arrived; the control connection carries other messages next."""

    @abstractmethod
    async def stop_receiving(self, tag: int, scratch: Buffer) -> bool:
        """End a pull before all chunks have arrived. `scratch` holds one chunk.

        Returns True when no buffer is in use and the channel can serve another pull. Otherwise the
        caller must close the channel.
        """

    @abstractmethod
    async def close(self) -> Unsettled:
        """Close everything but the control connection. May be called twice.

        Buffers given to `send` and `receive` are free when the returned futures are done; usually
        there are none.
        """


class Transport(ABC):
    """One worker's use of one transport. Its constructor takes the host that the worker listens on
    and the device of its KV."""

    scheme: str
    moves_gpu_memory = False
    """Whether it moves GPU memory to another GPU of the host. Known once started."""

    @abstractmethod
    def __init__(self, host: str, device: str) -> None: ...

    @abstractmethod
    async def start(self) -> bytes:
        """Load the library. Returns the address that peers need, for ChannelHello.

        Raises OperatorError when the transport cannot work here.
        """

    def register(self, memory: Buffer) -> None:  # noqa: B027, most transports need not know
        """Announce staging memory, before any of it is sent or received."""

    @abstractmethod
    def channel(self, connection: ControlConnection, peer: ChannelHello) -> TransferChannel:
        """Raises ProtocolError when `peer` has no usable address."""

    @abstractmethod
    async def close(self) -> None:
        """Called after all channels are closed."""


@dataclass(frozen=True)
class TransferEndpoint:
    """One worker's end of all its transfers: what the pulling and the serving half share."""

    config: KvTransferConfig
    layout: KvLayout
    transport: Transport
    transport_address: bytes
    gpu: CudaDevice | None  # of the engine's blocks; None: they lie in host memory
    threads: ThreadPoolExecutor  # for gather and scatter
