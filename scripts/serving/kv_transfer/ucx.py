"""KV blocks over UCX: one tagged message per chunk, several under way.

Only the source has an endpoint, one per peer, made from the worker address in the peer's Hello
and only after the peer proved with a nonce that it may pull: UCX itself authenticates nobody. Its
port lets in who proved that, the source that this side pulls from, and processes of this machine.
The control connections stay beside it because they report a dead peer at once and cost nothing
while idle. The only module that knows `ucxx`.

UCX can withdraw a message only by closing the endpoint, which ends the messages of all pulls on
it. So a pull that is given up settles its own: the source says how many chunks it sent, those are
received for nothing, and receives whose chunk will not come are satisfied by a message of this
process to itself. Endpoints for each pull would not help: UCX pairs the two sides' endpoints by
order of creation, so closing one can end another pull's.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil

from serving.errors import OperatorError
from serving.kv_transfer.link import SETTLE_S, Carrier, Link, finish, stop
from serving.kv_transfer.staging import Buffer, Unsettled
from serving.kv_transfer.transfer import LinkedTransfer
from serving.kv_transfer.ucx_lanes import lanes
from serving.kv_transfer.ucx_port import GuardedPorts
from serving.kv_transfer.wire import (
    Connection,
    Hello,
    Message,
    ProtocolError,
    Refusal,
    Refused,
    Stop,
    Stopped,
)

log = logging.getLogger(__name__)

CLOSE_NS = 10**9
MAX_HOSTS = 32

InFlight = asyncio.Task[Any]  # a UCX message that was posted

GPU_TRANSPORTS = {"cuda_ipc", "cuda_copy"}  # both: the way, and what UCX needs to touch memory


def ucx_environment(on_gpu: bool) -> dict[str, str]:
    """Read when UCX loads. What the person set stays, here and below."""
    return {
        # Of bounce buffers, where a message cannot go straight. ucxx's own default needs a GPU.
        "UCX_RNDV_FRAG_MEM_TYPE": "cuda" if on_gpu else "host",
        "UCX_WARN_UNUSED_ENV_VARS": "n",  # ucxx sets some that a build without CUDA does not know
    }


INFINIBAND = Path("/sys/class/infiniband")


def ucx_options(host: str) -> dict[str, str]:
    """UCX options for a worker that listens on `host`."""
    options = {
        # An endpoint that survives its peer's death cannot use shared memory (without that
        # promise UCX ends the process when the peer is gone), so no segments are made. All others
        # stay: network, `cuda_copy` and `cuda_ipc`.
        "TLS": "^sm",
        # The default of 8 KiB halves the speed. Sending must not exceed receiving.
        "TCP_TX_SEG_SIZE": "256k",
        "TCP_RX_SEG_SIZE": "256k",
    }
    # UCX would listen on every interface. With InfiniBand its choice of rails is better than ours.
    if _is_loopback(host) and Path("/sys/class/net/lo").exists():
        options["NET_DEVICES"] = "lo"
    elif (name := _interface_of(host)) and not any(INFINIBAND.glob("*")):
        options["NET_DEVICES"] = name
    return {k: v for k, v in options.items() if f"UCX_{k}" not in os.environ}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _interface_of(host: str) -> str:
    """The interface that has the address `host`; empty for a name or somebody else's address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == host for entry in entries):
            return name
    return ""


def own_hosts(device: str | None) -> list[str]:
    """IPv4 addresses that connections of this worker may come from: those of `device`, or of every
    interface where UCX, or the person, chooses.

    None may be missing: UCX connects to itself and waits for that with the whole process.
    """
    interfaces = psutil.net_if_addrs()
    return [
        entry.address
        for name in ([device] if device else interfaces)
        for entry in interfaces.get(name, [])
        if entry.family == socket.AF_INET
    ]


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """What Hello says of this side: the worker's address, and where its connections come from."""

    address: Annotated[bytes, msgspec.Meta(min_length=1)]
    hosts: Annotated[list[str], msgspec.Meta(max_length=MAX_HOSTS)]


_decode_endpoint = msgspec.msgpack.Decoder(Endpoint).decode


class UcxContext:
    """UCX in this process: `ucxx` has one context, bound to one event loop, for all transports."""

    current: UcxContext | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changing = asyncio.Lock()
        self._num_users = 0
        self._to_itself: Any = None
        self._fillers: set[InFlight] = set()
        self.port = GuardedPorts()
        self.mine = b""  # an Endpoint, for Hello
        self.ucxx: Any = None

    @classmethod
    async def acquire(cls, host: str, on_gpu: bool) -> UcxContext:
        """The context, running; the first user decides the options. Pair with `release`."""
        loop = asyncio.get_running_loop()
        if cls.current is None or cls.current._loop is not loop:
            if cls.current and cls.current._num_users:
                raise RuntimeError("another event loop of this process is using UCX")
            cls.current = cls(loop)
        context = cls.current
        async with context._changing:
            if context._num_users == 0:
                await context._start(host, on_gpu)
            context._num_users += 1
        return context

    async def release(self) -> None:
        async with self._changing:
            self._num_users -= 1
            if self._num_users == 0:
                await stop(self._fillers)
                await self._to_itself.close(period=CLOSE_NS)
                self._to_itself = None
                # ucxx hooks the loop's `close`, and that hook would keep its worker, with thread
                # and descriptors, for as long as the loop lives.
                vars(self._loop).pop("close", None)
                # Takes up to a second, the period of the thread that it joins.
                await finish(asyncio.to_thread(self.ucxx.reset))

    async def endpoint(self, address: bytes) -> Any:
        """A new endpoint to the worker at `address`. Raises ConnectionError."""
        try:
            worker = self.ucxx.get_ucx_address_from_buffer(bytearray(address))
            return await self.ucxx.create_endpoint_from_worker_address(worker)
        except self.ucxx.exceptions.UCXError as exc:
            raise ConnectionError(f"no UCX endpoint: {exc}") from exc

    def satisfy(self, tag: int) -> None:
        """End a receive that nobody else will. If its chunk did come after all, one byte stays
        in UCX's queue of unexpected messages."""
        filler = asyncio.create_task(
            self._to_itself.send(bytearray(1), tag=tag, force_tag=True), name="kv-filler"
        )
        self._fillers.add(filler)
        filler.add_done_callback(self._filled)

    def _filled(self, filler: InFlight) -> None:
        self._fillers.discard(filler)
        if not filler.cancelled() and (error := filler.exception()):
            log.warning("a UCX receive stays open: %s", error)

    @property
    def transports(self) -> set[str]:
        """What this build of UCX can use here."""
        return set(self.ucxx.get_active_transports())

    async def _start(self, host: str, on_gpu: bool) -> None:
        options = ucx_options(host)
        for name, value in ucx_environment(on_gpu).items():
            os.environ.setdefault(name, value)
        try:
            self.ucxx = await finish(asyncio.to_thread(importlib.import_module, "ucxx"))
            # Without futures every pending message polls the event loop and burns a core.
            self.port = GuardedPorts()
            self.port.opened_by(
                lambda: self.ucxx.init(options, progress_mode="thread", enable_python_future=True)
            )
            address = bytes(memoryview(self.ucxx.get_worker_address()))
            hosts = own_hosts(options.get("NET_DEVICES"))
            self.mine = msgspec.msgpack.encode(Endpoint(address, hosts[:MAX_HOSTS]))
            self.port.let_in(hosts)  # an endpoint to itself is a connection too
            self._to_itself = await self.endpoint(address)
        except Exception as exc:  # ImportError, OSError of a library, UCXError of many kinds
            raise OperatorError(
                f"UCX does not work here: {exc}",
                remedy="run `snakemake check_ucx`, or set kv_transfer.transport to tcp",
            ) from exc


class UcxLink(Link):
    """Messages of one pull at a time. The source sends, the other side receives by tag."""

    def __init__(self, connection: Connection, carrier: UcxCarrier, peer: Hello) -> None:
        super().__init__(connection)
        self._carrier = carrier
        try:
            self._peer = _decode_endpoint(peer.endpoint)
        except msgspec.MsgspecError as exc:
            raise ProtocolError(f"no UCX address: {exc}") from None
        self._ucxx = carrier.context.ucxx
        self._endpoint: Any = None
        self._sends: set[InFlight] = set()
        self._receives: dict[InFlight, int] = {}  # with the index of the chunk
        self._num_expected = 0
        self._tag = 0
        self._watch: asyncio.Task[Message] | None = None

    def let_in(self) -> None:
        self._carrier.context.port.let_in([self.connection.peer_host, *self._peer.hosts])

    async def open(self) -> None:
        self.let_in()
        self._endpoint = await self._carrier.endpoint(self._peer.address)

    def route(self, on_gpu: bool) -> str:
        names = {lane.split("/")[0] for lane in lanes(self._endpoint.ucp_endpoint)}
        if on_gpu and "cuda_ipc" in names:
            return "cuda_ipc"
        return ",".join(sorted(names - GPU_TRANSPORTS - {"self"} or names)) or "ucx"

    async def send(self, tag: int, index: int, data: Buffer) -> None:
        endpoint = self._endpoint
        message = asyncio.create_task(endpoint.send(data, tag=tag + index, force_tag=True))
        self._sends.add(message)
        message.add_done_callback(self._settled)
        await self._outcome(message)
        # ucxx returns from a send that the loss of the endpoint cancelled as if all were well.
        if endpoint.closed:
            raise ConnectionResetError("the UCX endpoint was lost")

    async def receive(self, tag: int, index: int, data: Buffer) -> None:
        self._tag, self._num_expected = tag, index + 1
        message = self._post_receive(index, data)
        watch = self._listen()
        await asyncio.wait({message, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            said = watch.result()  # raises when the peer is gone
            raise Refusal(said.reason) if isinstance(said, Refused) else ProtocolError(str(said))
        await self._outcome(message)

    async def finished(self) -> None:
        self._num_expected = 0
        if self._watch:
            watch, self._watch = self._watch, None
            await stop([watch])

    async def give_up(self, tag: int, scratch: Buffer) -> bool:
        self._tag = tag
        watch = self._listen()
        if watch.done():
            return False
        try:
            async with asyncio.timeout(SETTLE_S):
                await self.connection.send(Stop())
                stopped = await watch
                if not isinstance(stopped, Stopped):
                    return False
                self._satisfy(stopped.num_chunks)
                if self._receives:
                    await asyncio.wait(self._receives)
                for index in range(self._num_expected, stopped.num_chunks):
                    await self._outcome(self._post_receive(index, scratch))
        except OSError:  # a deadline is one, too
            return False
        await self.finished()
        return True

    async def close(self) -> Unsettled:
        await self.finished()
        self._satisfy(0)
        unsettled = await self._settling({*self._sends, *self._receives})
        if self._sends:
            await self._carrier.drop(self._endpoint)  # cancels them, and those of other pulls
            unsettled = await self._settling(unsettled)
        self._carrier.adopt(unsettled)
        return unsettled

    def _listen(self) -> asyncio.Task[Message]:
        """What the source says instead of sending, whenever that is."""
        if self._watch is None:
            self._watch = asyncio.create_task(self.connection.receive(), name="kv-watch")
        return self._watch

    def _post_receive(self, index: int, data: Buffer) -> InFlight:
        message = asyncio.create_task(self._ucxx.recv(data, tag=self._tag + index), name="kv-ucx")
        self._receives[message] = index
        message.add_done_callback(self._settled)
        return message

    def _satisfy(self, num_chunks: int) -> None:
        """End the receives of chunks from `num_chunks` on, which will not come."""
        for index in self._receives.values():
            if index >= num_chunks:
                self._carrier.context.satisfy(self._tag + index)

    async def _settling(self, messages: set[InFlight]) -> set[InFlight]:
        """Those that did not settle."""
        return (await asyncio.wait(messages, timeout=SETTLE_S))[1] if messages else set()

    def _settled(self, message: InFlight) -> None:
        self._sends.discard(message)
        self._receives.pop(message, None)
        if not message.cancelled():
            message.exception()  # after a failure nobody may be left to look at it

    async def _outcome(self, message: InFlight) -> None:
        """Who waits can be cancelled; the message goes on, and `close` deals with it."""
        try:
            await asyncio.shield(message)
        except self._ucxx.exceptions.UCXError as exc:
            raise ConnectionResetError(f"UCX: {exc}") from exc


class UcxCarrier(Carrier):
    """Owns the endpoints of one worker, and messages that outlived their pull."""

    scheme = "ucx"
    context: UcxContext

    def __init__(self, host: str, on_gpu: bool) -> None:
        self._host, self._on_gpu = host, on_gpu
        self._endpoints: dict[bytes, Any] = {}
        self._opening = asyncio.Lock()
        self._strays: set[InFlight] = set()

    async def start(self) -> bytes:
        self.context = await UcxContext.acquire(self._host, self._on_gpu)
        if self._on_gpu:
            missing = GPU_TRANSPORTS - self.context.transports
            self.reaches_gpus = not missing
            if missing:
                log.warning(
                    "KV travels through host memory: UCX has no %s here (of %s)",
                    " and no ".join(sorted(missing)),
                    ", ".join(sorted(self.context.transports)),
                )
        return self.context.mine

    def link(self, connection: Connection, peer: Hello) -> Link:
        return UcxLink(connection, self, peer)

    async def endpoint(self, peer: bytes) -> Any:
        """The endpoint to the peer's worker, a new one if there is none that works. Raises
        ConnectionError."""
        async with self._opening:
            for endpoint in [e for e in self._endpoints.values() if e.closed]:
                await self.drop(endpoint)
            if peer not in self._endpoints:
                self._endpoints[peer] = await self.context.endpoint(peer)
            return self._endpoints[peer]

    async def drop(self, endpoint: Any) -> None:
        """Close an endpoint that is of no more use."""
        self._endpoints = {k: e for k, e in self._endpoints.items() if e is not endpoint}
        await endpoint.close(period=CLOSE_NS)

    def adopt(self, messages: set[InFlight]) -> None:
        """Keep messages that do not end until they do, or until UCX itself does."""
        self._strays.update(messages)
        for message in messages:
            message.add_done_callback(self._strays.discard)

    async def close(self) -> None:
        for endpoint in list(self._endpoints.values()):
            await self.drop(endpoint)
        await self.context.release()
        # Only now does nothing write to the memory that they stand for.
        await stop(self._strays)


class UcxTransfer(LinkedTransfer):
    """See `KvTransfer`."""

    def _carrier(self) -> Carrier:
        return UcxCarrier(self.host, self.device != "cpu")
