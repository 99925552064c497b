"""The frontend's end: one connection to one instance, many requests on it."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from serving.errors import InstanceLost
from serving.framing import ProtocolError
from serving.protocol import (
    PROTOCOL_VERSION,
    Draining,
    EngineRequest,
    Hello,
    InstanceInfo,
    Ping,
    Pong,
    Proof,
    ReleaseKv,
    Step,
    ToFrontend,
)
from serving.rpc.connection import STALL_S, RpcConnection
from serving.rpc.handshake import frontend_proof, new_nonce, same, worker_proof
from serving.rpc.liveness import Liveness
from serving.rpc.output_stream import OutputStream


class WorkerConnection(RpcConnection):
    """The connection of one client, and the streams of the requests that it carries."""

    def __init__(self, client: RpcClient, stall_s: float) -> None:
        super().__init__(msgspec.msgpack.Decoder(ToFrontend), stall_s)
        self._client = client
        self._streams: dict[str, OutputStream] = {}
        self.liveness: Liveness | None = None
        self.hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()

    def open(self, request_id: str, stream: OutputStream) -> None:
        assert request_id not in self._streams, f"{request_id} is already running here"
        self._streams[request_id] = stream

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def drop(self, request_id: str, stream: OutputStream) -> bool:
        if self._streams.get(request_id) is not stream:
            return False
        del self._streams[request_id]
        return True

    def received(self, message: Any) -> None:
        if isinstance(message, Step):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue  # aborted meanwhile
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                stream.put(output)
        elif isinstance(message, Draining):
            self._client.drains()
        elif isinstance(message, Pong):
            if self.liveness is not None:
                self.liveness.answered(message.late_s)
        elif self.hello.done():
            raise ProtocolError("a second hello")
        else:
            self.hello.set_result(message)

    def watch(self, on_wedged: Callable[[str], None]) -> None:
        """Ping the worker from now on, if it answers pings."""
        if self.hello.result().pings:
            self.liveness = Liveness(lambda: self.send(Ping()), on_wedged)

    def fail_streams(self, reason: str) -> None:
        """Running requests raise InstanceLost, so that they can go on elsewhere."""
        lost = InstanceLost(self._client.info.instance_id, reason)
        for stream in self._streams.values():
            stream.fail(lost)

    def disconnected(self, reason: str) -> None:
        if self.liveness is not None:
            self.liveness.close()
        if not self.hello.done():
            self.hello.set_exception(InstanceLost(self._client.info.instance_id, reason))
            self.hello.exception()  # nobody may be waiting for it
        self.fail_streams(reason)
        self._streams.clear()
        self._client.disconnected(self)


class RpcClient:
    """A frontend's connection to one instance. It never reconnects: a new registration of the
    instance has a new epoch and gets a new client.

    With `merge`, a stream returns all queued outputs of its request as one. A frontend that has
    fallen behind then pays no more for a token than one that keeps up.
    """

    def __init__(
        self,
        info: InstanceInfo,
        *,
        secret: bytes = b"",
        stall_s: float = STALL_S,
        merge: bool = False,
    ) -> None:
        """With a `secret`, connects only to an instance that proves to know it."""
        self._secret = secret
        self.info = info
        self.draining = False
        self.address = ""
        self.on_lost: Callable[[], None] | None = None
        """Called once, when an established connection drops; not on `close`."""
        self.on_draining: Callable[[], None] | None = None
        """Called once when the worker announces that it drains."""
        self.on_wedged: Callable[[str], None] | None = None
        """Called each second with a reason while the worker does not compute, and once with an
        empty reason when it does again."""
        self.merge = merge
        self._stall_s = stall_s
        self._connection: WorkerConnection | None = None

    async def connect(self, deadline_s: float = 5.0) -> None:
        """Try the addresses in order. Raises InstanceLost when none leads to this instance and epoch."""
        reasons = []
        try:
            async with asyncio.timeout(deadline_s):
                for address in self.info.rpc_addresses:
                    try:
                        self._connection = await self._open(address)
                        self._connection.watch(self._wedged)
                    except (OSError, ValueError, InstanceLost) as exc:
                        reasons.append(f"{address}: {exc}")
                    else:
                        self.address = address
                        return
        except TimeoutError:
            reasons.append(f"no answer within {deadline_s:g} s")
        raise InstanceLost(self.info.instance_id, "; ".join(reasons) or "it has no address")

    async def _open(self, address: str) -> WorkerConnection:
        loop = asyncio.get_running_loop()
        connection = WorkerConnection(self, self._stall_s)
        if address.startswith("unix:"):
            path = address.removeprefix("unix:")
            if not _is_socket(path):
                raise FileNotFoundError("no such socket")
            await loop.create_unix_connection(lambda: connection, path)
        elif address.startswith("tcp://"):
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            await loop.create_connection(lambda: connection, host.strip("[]"), int(port))
        else:
            raise ValueError("neither unix: nor tcp://")
        try:
            mine = Hello(PROTOCOL_VERSION, nonce=new_nonce() if self._secret else b"")
            connection.send(mine)
            theirs = await connection.hello
            self._check(theirs)
            self._prove(connection, mine, theirs)
            if connection.closing:
                raise InstanceLost(self.info.instance_id)
        except BaseException:
            if connection.transport is not None:
                connection.transport.abort()
            raise
        return connection

    def _check(self, hello: Hello) -> None:
        found = (hello.version, hello.instance_id, hello.epoch)
        wanted = (PROTOCOL_VERSION, self.info.instance_id, self.info.epoch)
        if found != wanted:
            raise InstanceLost(
                self.info.instance_id,
                "version {}, instance {}, epoch {} answered".format(*found)
                + ", expected {}, {}, {}".format(*wanted),
            )

    def _prove(self, connection: WorkerConnection, mine: Hello, theirs: Hello) -> None:
        if self._secret:
            if not same(theirs.proof, worker_proof(self._secret, mine, theirs)):
                raise InstanceLost(self.info.instance_id, "it does not know the secret")
            connection.send(Proof(frontend_proof(self._secret, mine, theirs)))
        elif theirs.nonce:
            raise InstanceLost(self.info.instance_id, "it asks for a secret")

    @property
    def wedged(self) -> str:
        """Why the worker does not compute, as far as its pings tell; empty when it does."""
        connection = self._connection
        return connection.liveness.reason if connection and connection.liveness else ""

    def _wedged(self, reason: str) -> None:
        if self.on_wedged is not None:
            self.on_wedged(reason)

    def fail_streams(self, reason: str) -> None:
        """Running requests raise InstanceLost; the connection stays."""
        if self._connection is not None:
            self._connection.fail_streams(reason)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def num_streams(self) -> int:
        """Requests whose last output has not arrived."""
        return self._connection.num_streams if self._connection is not None else 0

    def connection(self) -> WorkerConnection:
        """Raises InstanceLost when there is none."""
        if self._connection is None:
            raise InstanceLost(self.info.instance_id, "not connected")
        return self._connection

    def generate(self, request: EngineRequest) -> OutputStream:
        """`async with client.generate(request) as outputs: async for output in outputs: ...`"""
        return OutputStream(self.connection, request, merge=self.merge)

    def release(self, request_id: str) -> None:
        """Let the worker free what a finished prefill holds. Raises InstanceLost."""
        self.connection().send(ReleaseKv(request_id))

    async def close(self) -> None:
        """Running streams raise InstanceLost; `on_lost` is not called."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def drains(self) -> None:
        """Called by the connection: the worker takes no new requests."""
        if not self.draining:
            self.draining = True
            if self.on_draining is not None:
                self.on_draining()

    def disconnected(self, connection: WorkerConnection) -> None:
        if connection is not self._connection:
            return  # closed on purpose, or never became ours
        self._connection = None
        if self.on_lost is not None:
            self.on_lost()


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False
