"""KV blocks over NIXL: the source says where a chunk lies, the other side reads it from there.

Chunks are packed and staged as for every transport, because a read of many small blocks is what is
slow (12 GB/s for blocks of 64 KiB between two H100s). Optional: NIXL brings a UCX of its own, with
InfiniBand. The only module that knows it.

Its progress thread would use up a core for as long as the worker lives, so messages move only
while somebody polls: the reader for its reads, the source for the notices that they are over.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import secrets
import time
from typing import Any, TypeVar

from serving.errors import OperatorError
from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.link import SETTLE_S, Carrier, Link, stop
from serving.kv_transfer.staging import Buffer, Unsettled
from serving.kv_transfer.transfer import LinkedTransfer
from serving.kv_transfer.wire import (
    ChunkAt,
    Connection,
    Hello,
    Message,
    ProtocolError,
    Refusal,
    Refused,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
REMEDY = "`pip install nixl-cu13` (or -cu12), or set kv_transfer.transport to ucx"
BACKEND = "UCX"
SPIN_S = 0.002  # a chunk between GPUs takes less; timers of event loops cannot wait so shortly
POLL_S = 0.001


def nixl_module() -> str:
    """The module of whichever build is installed; empty if none is."""
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            return name
    return ""


class NixlLink(Link):
    """Chunks are announced in order on the connection, and read several at a time."""

    def __init__(self, connection: Connection, carrier: NixlCarrier) -> None:
        super().__init__(connection)
        self._carrier = carrier
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()  # both serve in order
        self._told = 0  # how much of this side's memory the peer knows of
        self._peer = ""
        self._reads: set[asyncio.Task[None]] = set()
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._listening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """The reader connects."""

    def route(self, on_gpu: bool) -> str:
        return f"{BACKEND} between {'GPUs' if on_gpu else 'hosts'}"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        taken = self._carrier.expect(tag + index)
        try:
            async with self._sending:
                known, agent = self._carrier.described(self._told)
                address, device = where(data)
                await self.connection.send(ChunkAt(index, address, data.nbytes, device, agent))
                self._told = known
            await taken
        finally:
            self._carrier.forget(tag + index)

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        async with self._receiving:
            coming = asyncio.create_task(self._messages.get())
            try:
                message = await self._unless_lost(coming)
            finally:
                coming.cancel()
        if isinstance(message, Refused):
            raise Refusal(message.reason)
        if not isinstance(message, ChunkAt) or (message.index, message.num_bytes) != (
            index,
            data.nbytes,
        ):
            raise ProtocolError(f"{message} instead of chunk {index}")
        if message.agent:
            self._peer = self._carrier.meet(message.agent)
        read = asyncio.create_task(
            self._carrier.read(self._peer, tag + index, message, data), name="kv-nixl"
        )
        self._reads.add(read)
        read.add_done_callback(self._settled)
        await self._unless_lost(read)

    async def finished(self) -> None:
        if self._listening:
            listening, self._listening = self._listening, None
            await stop([listening])

    async def give_up(self, tag: int, scratch: Buffer) -> bool:
        return False  # reads cannot be withdrawn

    async def close(self) -> Unsettled:
        await self.finished()
        unsettled = set(self._reads)
        if unsettled:
            _, unsettled = await asyncio.wait(unsettled, timeout=SETTLE_S)
        self._carrier.adopt(unsettled)
        return unsettled

    async def _unless_lost(self, work: asyncio.Task[T]) -> T:
        """The outcome of `work`; raises when the connection ends first, for a read from a source
        that has gone may never end. A read goes on when who waits is cancelled."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen(), name="kv-nixl-listen")
        await asyncio.wait({work, self._listening}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self._listening.result()
        return work.result()

    async def _listen(self) -> None:
        while True:
            self._messages.put_nowait(await self.connection.receive())

    def _settled(self, read: asyncio.Task[None]) -> None:
        self._reads.discard(read)
        if not read.cancelled():
            read.exception()  # after a failure nobody may be left to look at it


def where(data: Buffer) -> tuple[int, int]:
    """Address, and device (-1: host memory)."""
    if isinstance(data, GpuBuffer):
        return data.address, data.device
    return data.ctypes.data, -1


def _kind(device: int) -> str:
    return "DRAM" if device < 0 else "VRAM"


class NixlCarrier(Carrier):
    """One NIXL agent, the memory registered with it, and what it waits for."""

    scheme = "nixl"

    def __init__(self) -> None:
        self._agent: Any
        self._registered: list[tuple[Any, Buffer]] = []
        self._taken: dict[bytes, asyncio.Future[None]] = {}
        self._polling: asyncio.Task[None] | None = None
        self._strays: set[asyncio.Task[None]] = set()

    async def start(self) -> bytes:
        try:
            self._agent = await asyncio.to_thread(self._load)
        except Exception as exc:  # ImportError, and whatever the library raises
            raise OperatorError(f"NIXL does not work here: {exc}", remedy=REMEDY) from exc
        kinds = self._agent.get_backend_mem_types(BACKEND)  # `VRAM_SEG`, `DRAM_SEG`
        self.reaches_gpus = any(kind.startswith("VRAM") for kind in kinds)
        return b""

    def _load(self) -> Any:
        name = nixl_module()
        if not name:
            raise ImportError("it is not installed")
        # Otherwise it tells about itself on the standard output, which may not be a log.
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        api = importlib.import_module(f"{name}._api")
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            backends=[BACKEND],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        return api.nixl_agent(secrets.token_hex(16), config)

    def register(self, memory: Buffer) -> None:
        address, device = where(memory)
        described = self._agent.register_memory(
            [(address, memory.nbytes, max(0, device), "")], _kind(device)
        )
        self._registered.append((described, memory))

    def link(self, connection: Connection, peer: Hello) -> Link:
        return NixlLink(connection, self)

    async def close(self) -> None:
        await stop([*self._strays, *([self._polling] if self._polling else [])])
        for described, _ in self._registered:
            self._agent.deregister_memory(described)
        self._registered.clear()
        del self._agent

    # --- the source ----------------------------------------------------------------------------

    def described(self, known: int) -> tuple[int, bytes]:
        """How much memory there is to know of, and its description if that is more than `known`."""
        count = len(self._registered)
        return count, self._agent.get_agent_metadata() if count > known else b""

    def expect(self, tag: int) -> asyncio.Future[None]:
        """Done when the peer has read the chunk of this tag."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._taken[_notice(tag)] = future
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(), name="kv-nixl-poll")
        return future

    def forget(self, tag: int) -> None:
        self._taken.pop(_notice(tag), None)

    async def _poll(self) -> None:
        started = time.monotonic()
        while self._taken:
            for notices in self._agent.get_new_notifs().values():
                started = time.monotonic()
                for notice in notices:
                    future = self._taken.get(notice)
                    if future and not future.done():
                        future.set_result(None)
            await pause(started)
        self._polling = None

    # --- the reader ----------------------------------------------------------------------------

    def meet(self, agent: bytes) -> str:
        """Learn of a peer, or of more of its memory; returns its name. Raises ConnectionError."""
        try:
            name = self._agent.add_remote_agent(agent)
            return name.decode() if isinstance(name, bytes) else str(name)
        except Exception as exc:  # the bindings' own errors
            raise ConnectionError(f"NIXL does not reach the peer: {exc}") from exc

    async def read(self, peer: str, tag: int, chunk: ChunkAt, data: Buffer) -> None:
        """Raises ConnectionError. Not to be cancelled while `data` matters."""
        address, device = where(data)
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs([(address, data.nbytes, max(0, device))], _kind(device)),
                self._agent.get_xfer_descs(
                    [(chunk.address, chunk.num_bytes, max(0, chunk.device))], _kind(chunk.device)
                ),
                peer,
                _notice(tag),
            )
            started = time.monotonic()
            state = self._agent.transfer(handle)
            while state == "PROC":
                await pause(started)
                state = self._agent.check_xfer_state(handle)
            self._agent.release_xfer_handle(handle)
        except Exception as exc:  # the bindings' own errors
            raise ConnectionResetError(f"NIXL: {exc}") from exc
        if state != "DONE":
            raise ConnectionResetError(f"NIXL: the read ended as {state}")

    def adopt(self, reads: set[asyncio.Task[None]]) -> None:
        """Keep reads that do not end until they do, or until the agent does."""
        self._strays.update(reads)
        for read in reads:
            read.add_done_callback(self._strays.discard)


def _notice(tag: int) -> bytes:
    return tag.to_bytes(8, "little")


async def pause(since: float) -> None:
    """Between two looks at something that began at `since` (`time.monotonic`)."""
    await asyncio.sleep(0 if time.monotonic() - since < SPIN_S else POLL_S)


class NixlTransfer(LinkedTransfer):
    """See `KvTransfer`."""

    def _carrier(self) -> Carrier:
        return NixlCarrier()
