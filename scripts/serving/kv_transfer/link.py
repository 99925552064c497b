"""What UCX and TCP do differently, as a contract for the two halves that they share.

`BlockServer` (server.py) and `Puller` (pull.py) speak over control connections and stage blocks;
a Link moves one chunk of them. Here too: how to be cancelled while a thread or a transport still
touches memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.kv_layout import KvLayout
from serving.kv_transfer.gpu_memory import Gpu, Mapping
from serving.kv_transfer.memory import Staging
from serving.kv_transfer.staging import Buffer, Unsettled
from serving.kv_transfer.wire import Connection, Hello

T = TypeVar("T")

SETTLE_S = 1.0  # what messages under way get to end after a transfer failed


class Link(ABC):
    """The way of blocks beside one control connection. A link serves one pull at a time.

    Every failure of the way or of the peer is a ConnectionError (or another OSError), a refusal
    in place of a chunk is a Refusal; after either, only `close` makes sense.
    """

    on_gpu = False
    """Whether the two ends' staging memory on GPUs is within reach of each other."""

    pool: Mapping | None = None
    """The blocks of the peer, where this side can read them in place."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def let_in(self) -> None:  # noqa: B027, most have no port of their own
        """The peer may reach this side's data endpoint, because this side chose to pull from it."""

    @abstractmethod
    async def open(self) -> None:
        """Make ready to send. Called before each pull, and only once the peer is entitled."""

    @abstractmethod
    def route(self, on_gpu: bool) -> str:
        """What carries the blocks, for people to read. For the source, once it is open."""

    @abstractmethod
    async def send(self, tag: int, index: int, data: Buffer) -> None:
        """Send chunk `index`; several may be under way, started in order. Returns when the
        transport needs `data` no more. When cancelled, `close` decides about `data`."""

    @abstractmethod
    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        """Receive chunk `index` into all of `data`; as for `send`."""

    @abstractmethod
    async def finished(self) -> None:
        """All chunks are here; the connection is used for other messages next."""

    @abstractmethod
    async def give_up(self, tag: int, scratch: Buffer) -> bool:
        """Stop receiving midway. True when the link can be used again and no buffer is in use;
        otherwise it has to be closed. `scratch` holds a chunk."""

    @abstractmethod
    async def close(self) -> Unsettled:
        """Close all but the connection. Buffers given to `send` and `receive` are free when the
        returned futures are done; normally there are none. May be called twice."""


class Carrier(ABC):
    """One transport of one worker: makes links."""

    scheme: str
    reaches_gpus = False
    """Whether it moves GPU memory to another GPU of the host. Known when started."""

    @abstractmethod
    async def start(self) -> bytes:
        """Prepare; returns the address of this side's data endpoint, sent in Hello. Raises
        OperatorError when the transport cannot work here."""

    def register(self, memory: Buffer) -> None:  # noqa: B027, most need not know it
        """Staging memory, before any of it is sent or received."""

    @abstractmethod
    def link(self, connection: Connection, peer: Hello) -> Link: ...

    @abstractmethod
    async def close(self) -> None:
        """After all links are closed."""


@dataclass(frozen=True)
class Side:
    """One worker's end: what its two halves share."""

    carrier: Carrier
    endpoint: bytes
    layout: KvLayout
    chunk_bytes: int | None
    gpu: Gpu | None  # where the engine's blocks are; None: in host memory
    threads: ThreadPoolExecutor
    connect_s: float
    transfer_s: float
    in_place: bool

    def staging(self) -> Staging:
        return Staging(self.layout, self.chunk_bytes, self.gpu, self.carrier.register)


async def finish(work: Awaitable[T]) -> T:
    """Await `work`; when cancelled, let it end first, because it touches memory or releases it."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # cancellation takes precedence, but the outcome was looked at
        raise


async def all_of(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait for all, or raise the first failure. Unlike `gather`, never cancels them."""
    if tasks:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()


async def stop(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel, and wait until all are over."""
    stopping = list(tasks)
    for task in stopping:
        task.cancel()
    await finish(asyncio.gather(*stopping, return_exceptions=True))
