"""KV blocks over NIXL: the source announces where a chunk lies, and the peer reads it there.

Chunks are packed and staged as for every transport, because reads of many small blocks are slow
(12 GB/s for blocks of 64 KiB between two H100s). NIXL is optional and brings a UCX of its own, with
InfiniBand. This is the only module that knows it.

NIXL's progress thread would occupy a core for as long as the worker lives. Without it, messages move
only while somebody polls: the reader polls its reads, the source polls for the end of each read.
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
from serving.framing import ProtocolError
from serving.kv_transfer.cancellation import stop
from serving.kv_transfer.control import ControlConnection
from serving.kv_transfer.gpu_memory import GpuBuffer
from serving.kv_transfer.messages import ChannelHello, ChunkAt, Message, Refusal, Refused
from serving.kv_transfer.staging_pool import Buffer
from serving.kv_transfer.transport import SETTLE_S, TransferChannel, Transport, Unsettled

log = logging.getLogger(__name__)

T = TypeVar("T")

MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
REMEDY = "`pip install nixl-cu13` (or -cu12), or set kv_transfer.transport to ucx"
BACKEND = "UCX"
SPIN_S = 0.002  # a chunk between GPUs takes less, and an event loop's timers are coarser
POLL_S = 0.001


def nixl_module() -> str:
    """The name of the installed build's module; empty if NIXL is not installed."""
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            return name
    return ""


class NixlChannel(TransferChannel):
    """Chunks are announced in order on the connection, and read several at a time."""

    def __init__(self, connection: ControlConnection, agent: NixlAgent) -> None:
        super().__init__(connection)
        self._agent = agent
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()  # both serve in order
        self._num_described = 0  # regions of this worker's memory that the peer knows
        self._peer = ""
        self._reads: set[asyncio.Task[None]] = set()
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._listening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """The reader connects by itself."""

    def route(self, on_gpu: bool) -> str:
        return f"{BACKEND} between {'GPUs' if on_gpu else 'hosts'}"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        read = self._agent.expect_read(tag + index)
        try:
            async with self._sending:
                count, description = self._agent.describe(self._num_described)
                address, device = location(data)
                await self.connection.send(
                    ChunkAt(index, address, data.nbytes, device, description)
                )
                self._num_described = count
            await read
        finally:
            self._agent.forget(tag + index)

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        async with self._receiving:
            next_message = asyncio.create_task(self._messages.get())
            try:
                message = await self._unless_lost(next_message)
            finally:
                next_message.cancel()
        if isinstance(message, Refused):
            raise Refusal(message.reason)
        if not isinstance(message, ChunkAt) or (message.index, message.num_bytes) != (
            index,
            data.nbytes,
        ):
            raise ProtocolError(f"{message} instead of chunk {index}")
        if message.agent:
            self._peer = self._agent.add_peer(message.agent)
        read = asyncio.create_task(
            self._agent.read(self._peer, tag + index, message, data), name="kv-nixl"
        )
        self._reads.add(read)
        read.add_done_callback(self._settled)
        await self._unless_lost(read)

    async def finished(self) -> None:
        if self._listening:
            listening, self._listening = self._listening, None
            await stop([listening])

    async def stop_receiving(self, tag: int, scratch: Buffer) -> bool:
        return False  # reads cannot be withdrawn

    async def close(self) -> Unsettled:
        await self.finished()
        unsettled = set(self._reads)
        if unsettled:
            _, unsettled = await asyncio.wait(unsettled, timeout=SETTLE_S)
        self._agent.adopt(unsettled)
        return unsettled

    async def _unless_lost(self, work: asyncio.Task[T]) -> T:
        """The outcome of `work`. Raises when the connection ends first, because a read from a dead
        source may never end. A cancelled caller does not cancel `work`."""
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
            read.exception()  # after a failure nobody else may retrieve it


def location(data: Buffer) -> tuple[int, int]:
    """Address, and device (-1: host memory)."""
    if isinstance(data, GpuBuffer):
        return data.address, data.device
    return data.ctypes.data, -1


def _kind(device: int) -> str:
    return "DRAM" if device < 0 else "VRAM"


class NixlAgent:
    """The library's agent of one worker: registered memory, reads, and notices of peers' reads."""

    def __init__(self, module: str) -> None:
        """Loads the library `module`. Raises whatever it raises; ImportError for an empty name."""
        if not module:
            raise ImportError("it is not installed")
        # Otherwise it logs to the standard output, which may not be a log.
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        api = importlib.import_module(f"{module}._api")
        config = api.nixl_agent_config(
            enable_prog_thread=False,
            backends=[BACKEND],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._agent: Any = api.nixl_agent(secrets.token_hex(16), config)
        self._registered: list[tuple[Any, Buffer]] = []
        self._expected: dict[bytes, asyncio.Future[None]] = {}  # reads of peers, by their notice
        self._polling: asyncio.Task[None] | None = None
        self._strays: set[asyncio.Task[None]] = set()

    @property
    def moves_gpu_memory(self) -> bool:
        kinds = self._agent.get_backend_mem_types(BACKEND)  # `VRAM_SEG`, `DRAM_SEG`
        return any(kind.startswith("VRAM") for kind in kinds)

    def register(self, memory: Buffer) -> None:
        address, device = location(memory)
        region = self._agent.register_memory(
            [(address, memory.nbytes, max(0, device), "")], _kind(device)
        )
        self._registered.append((region, memory))

    async def close(self) -> None:
        await stop([*self._strays, *([self._polling] if self._polling else [])])
        for region, _ in self._registered:
            self._agent.deregister_memory(region)
        self._registered.clear()
        del self._agent

    # --- the source ----------------------------------------------------------------------------

    def describe(self, num_known: int) -> tuple[int, bytes]:
        """The number of registered regions, and a description if that is more than `num_known`."""
        count = len(self._registered)
        return count, self._agent.get_agent_metadata() if count > num_known else b""

    def expect_read(self, tag: int) -> asyncio.Future[None]:
        """Done when the peer has read the chunk of this tag."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._expected[_notice(tag)] = future
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(), name="kv-nixl-poll")
        return future

    def forget(self, tag: int) -> None:
        self._expected.pop(_notice(tag), None)

    async def _poll(self) -> None:
        started = time.monotonic()
        while self._expected:
            for notices in self._agent.get_new_notifs().values():
                started = time.monotonic()
                for notice in notices:
                    future = self._expected.get(notice)
                    if future and not future.done():
                        future.set_result(None)
            await pause(started)
        self._polling = None

    # --- the reader ----------------------------------------------------------------------------

    def add_peer(self, description: bytes) -> str:
        """Learn of a peer, or of more of its memory; returns its name. Raises ConnectionError."""
        try:
            name = self._agent.add_remote_agent(description)
            return name.decode() if isinstance(name, bytes) else str(name)
        except Exception as exc:  # the bindings' own errors
            raise ConnectionError(f"NIXL does not reach the peer: {exc}") from exc

    async def read(self, peer: str, tag: int, chunk: ChunkAt, data: Buffer) -> None:
        """Raises ConnectionError. Must not be cancelled while `data` is in use."""
        address, device = location(data)
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
        """Keep reads that do not end, until they do or the agent is closed."""
        self._strays.update(reads)
        for read in reads:
            read.add_done_callback(self._strays.discard)


def _notice(tag: int) -> bytes:
    return tag.to_bytes(8, "little")


async def pause(since: float) -> None:
    """Between two polls of an operation that began at `since` (`time.monotonic`)."""
    await asyncio.sleep(0 if time.monotonic() - since < SPIN_S else POLL_S)


class NixlTransport(Transport):
    scheme = "nixl"

    def __init__(self, host: str = "", device: str = "cpu", module: str | None = None) -> None:
        """Needs neither `host` nor `device`. `module` None: that of the installed build."""
        self._module = nixl_module() if module is None else module
        self._agent: NixlAgent

    async def start(self) -> bytes:
        try:
            self._agent = await asyncio.to_thread(NixlAgent, self._module)
        except Exception as exc:  # ImportError, and whatever the library raises
            raise OperatorError(f"NIXL does not work here: {exc}", remedy=REMEDY) from exc
        self.moves_gpu_memory = self._agent.moves_gpu_memory
        return b""

    def register(self, memory: Buffer) -> None:
        self._agent.register(memory)

    def channel(self, connection: ControlConnection, peer: ChannelHello) -> TransferChannel:
        return NixlChannel(connection, self._agent)

    async def close(self) -> None:
        await self._agent.close()
