"""The frontend's end: one connection to one instance, many requests on it."""

from __future__ import annotations

import asyncio
import itertools
import stat
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from serving.errors import InstanceLost, ServingError
from serving.framing import ProtocolError
from serving.protocol import (
    PROTOCOL_VERSION,
    Abort,
    Draining,
    EngineOutput,
    EngineRequest,
    ErrorInfo,
    Generate,
    Hello,
    InstanceInfo,
    Ping,
    Pong,
    Proof,
    Release,
    Step,
    ToFrontend,
)
from serving.rpc.connection import STALL_S, RpcConnection
from serving.rpc.errors import raise_error
from serving.rpc.handshake import frontend_proof, new_nonce, same, worker_proof


class OutputStream:
    """The outputs of one request: `async with client.generate(...) as outputs`, then iterate.

    Leaving before the last output aborts the request on the worker. Iterating raises what
    `raise_error` raises, and InstanceLost when the connection drops; deadlines are the caller's.
    """

    __slots__ = ("_client", "_connection", "_error", "_finished", "_queue", "_request", "_waiter")

    def __init__(self, client: RpcClient, request: EngineRequest) -> None:
        self._client, self._request = client, request
        self._connection: WorkerConnection | None = None
        self._queue: deque[EngineOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: ServingError | None = None
        self._finished = False

    async def __aenter__(self) -> OutputStream:
        """Sends the request. Raises InstanceLost without a connection."""
        self._connection = self._client.connection()
        self._connection.open(self._request.request_id, self)
        self._connection.send(Generate(self._request))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._connection is not None
        if self._connection.drop(self._request.request_id, self):
            self._connection.send(Abort(self._request.request_id))

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> EngineOutput:
        while not self._queue:
            if self._finished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output = self._queue.popleft()
        if self._queue and self._client.merge and _is_plain(output):
            output = self._with_following(output)
        if output.finish_reason is not None:
            self._finished = True
            if output.finish_reason == "error":
                raise_error(output.error or ErrorInfo("EngineFailed", "no reason given"))
        return output

    def _with_following(self, first: EngineOutput) -> EngineOutput:
        """`first` and the plain ones behind it, as one."""
        queue, parts = self._queue, [first]
        while queue and parts[-1].finish_reason is None and _is_plain(queue[0]):
            parts.append(queue.popleft())
        if len(parts) == 1:
            return first
        logprobs = None
        if first.logprobs is not None:
            logprobs = [entry for part in parts for entry in part.logprobs or ()]
        return EngineOutput(
            first.request_id,
            [token_id for part in parts for token_id in part.token_ids],
            parts[-1].finish_reason,
            first.cached_tokens,
            parts[-1].stop_token_id,
            logprobs,
            prompt_logprobs=first.prompt_logprobs,
        )

    # called by the connection

    def put(self, output: EngineOutput) -> None:
        self._queue.append(output)
        self._wake()

    def fail(self, error: ServingError) -> None:
        """Raised once what has already arrived is consumed."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _is_plain(output: EngineOutput) -> bool:
    """Only tokens and perhaps their end: it can be told together with those before it."""
    return (
        output.kv_transfer_params is None
        and output.error is None
        and output.finish_reason in (None, "stop", "length")
    )


class WorkerConnection(RpcConnection):
    def __init__(self, client: RpcClient, stall_s: float) -> None:
        super().__init__(msgspec.msgpack.Decoder(ToFrontend), stall_s)
        self._client = client
        self._streams: dict[str, OutputStream] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_numbers = itertools.count()
        self.hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()

    def open(self, request_id: str, stream: OutputStream) -> None:
        assert request_id not in self._streams, f"{request_id} is already running here"
        self._streams[request_id] = stream

    def drop(self, request_id: str, stream: OutputStream) -> bool:
        """True when it was still running."""
        if self._streams.get(request_id) is not stream:
            return False
        del self._streams[request_id]
        return True

    async def ping(self) -> None:
        """One round trip. Raises InstanceLost when the connection drops meanwhile."""
        number = next(self._ping_numbers)
        self._pings[number] = asyncio.get_running_loop().create_future()
        self.send(Ping(number))
        try:
            await self._pings[number]
        finally:
            del self._pings[number]

    def received(self, message: Any) -> None:
        if isinstance(message, Step):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue  # aborted meanwhile
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                stream.put(output)
        elif isinstance(message, Pong):
            if (waiting := self._pings.get(message.id)) is not None and not waiting.done():
                waiting.set_result(None)
        elif isinstance(message, Draining):
            self._client.drains()
        elif self.hello.done():
            raise ProtocolError("a second hello")
        else:
            self.hello.set_result(message)

    def disconnected(self, why: str) -> None:
        lost = InstanceLost(self._client.info.instance_id, why)
        if not self.hello.done():
            self.hello.set_exception(lost)
            self.hello.exception()  # nobody may be waiting
        for waiting in self._pings.values():
            if not waiting.done():
                waiting.set_exception(lost)
        for stream in self._streams.values():
            stream.fail(lost)
        self._streams.clear()
        self._client.disconnected(self)


class RpcClient:
    """A frontend's connection to one instance. It is never reconnected: a new registration of the
    instance has a new epoch and gets a new client.

    `merge`: what arrived of a request since its stream was looked at last comes as one output, which
    costs a frontend that is behind no more per token than one that is not.
    """

    def __init__(
        self,
        info: InstanceInfo,
        *,
        secret: bytes = b"",
        stall_s: float = STALL_S,
        merge: bool = False,
    ) -> None:
        """With a `secret`, only an instance that proves to know it is spoken to."""
        self._secret = secret
        self.info = info
        self.draining = False
        self.address = ""
        self.on_lost: Callable[[], None] | None = None
        """Called once when an established connection drops, not on `close`."""
        self.on_draining: Callable[[], None] | None = None
        """Called once when the worker announces that it drains."""
        self.merge = merge
        self._stall_s = stall_s
        self._connection: WorkerConnection | None = None

    async def connect(self, deadline_s: float = 5.0) -> None:
        """Try the addresses in order. Raises InstanceLost when none leads to this very instance."""
        reasons = []
        try:
            async with asyncio.timeout(deadline_s):
                for address in self.info.rpc_addresses:
                    try:
                        self._connection = await self._open(address)
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
            asked = Hello(PROTOCOL_VERSION, nonce=new_nonce() if self._secret else b"")
            connection.send(asked)
            answer = await connection.hello
            self._check(answer)
            self._prove(connection, asked, answer)
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

    def _prove(self, connection: WorkerConnection, asked: Hello, answer: Hello) -> None:
        if self._secret:
            if not same(answer.proof, worker_proof(self._secret, asked, answer)):
                raise InstanceLost(self.info.instance_id, "it does not know the secret")
            connection.send(Proof(frontend_proof(self._secret, asked, answer)))
        elif answer.nonce:
            raise InstanceLost(self.info.instance_id, "it asks for a secret")

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connection(self) -> WorkerConnection:
        """Raises InstanceLost when there is none."""
        if self._connection is None:
            raise InstanceLost(self.info.instance_id, "not connected")
        return self._connection

    def generate(self, request: EngineRequest) -> OutputStream:
        """`async with client.generate(request) as outputs: async for output in outputs: ...`"""
        return OutputStream(self, request)

    def release(self, request_id: str) -> None:
        """Let the worker free what a finished prefill holds. Raises InstanceLost."""
        self.connection().send(Release(request_id))

    async def ping(self, deadline_s: float) -> float:
        """Seconds of one round trip. Raises InstanceLost, also when the deadline passes."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                await self.connection().ping()
        except TimeoutError:
            raise InstanceLost(
                self.info.instance_id, f"no answer within {deadline_s:g} s"
            ) from None
        return time.monotonic() - start

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
