"""The worker's end: accepts frontends, passes their requests on, and returns the outputs to them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from serving.errors import EngineFailed, InvalidRequest, ServingError
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
    Ping,
    Pong,
    Proof,
    ReleaseKv,
    Step,
    ToWorker,
)
from serving.rpc.connection import STALL_S, RpcConnection
from serving.rpc.handshake import frontend_proof, new_nonce, same, worker_proof

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""A peer that has not completed the handshake by then is disconnected."""
HANDSHAKE_BYTES = 4096
"""Largest unfinished message that is kept for a peer before the handshake is complete."""


class RpcHandler(Protocol):
    """What a worker does with the messages of frontends."""

    def on_generate(self, request: EngineRequest) -> None:
        """Start a request; its outputs go to `RpcServer.send`. A ServingError becomes its last one."""

    def on_abort(self, request_id: str) -> None:
        """The frontend no longer wants the request, or has disconnected."""

    def on_release(self, request_id: str) -> None:
        """Nobody will fetch the KV that a finished prefill holds."""


class FrontendConnection(RpcConnection):
    """One connected frontend and its running requests."""

    def __init__(self, server: RpcServer) -> None:
        super().__init__(msgspec.msgpack.Decoder(ToWorker), server.stall_s)
        self._server = server
        self._greeted = False
        self._awaited_proof = b""
        self._handshake_deadline: asyncio.TimerHandle | None = None
        self.live: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.remember(self)
        loop = asyncio.get_running_loop()
        self._handshake_deadline = loop.call_later(
            self._server.handshake_s, self.fail, "it did not introduce itself"
        )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._greeted and self._parser.num_pending > HANDSHAKE_BYTES:
            self.fail("it sent more than an introduction")

    def received(self, message: Any) -> None:
        if not self._greeted:
            if self._awaited_proof:
                self._check_proof(message)
            else:
                self._greet(message)
        elif isinstance(message, Generate):
            self._server.generate(self, message.request)
        elif isinstance(message, Abort):
            self._server.abort(self, message.request_id)
        elif isinstance(message, ReleaseKv):
            self._server.release(message.request_id)
        elif isinstance(message, Ping):
            self.send(Pong(self._server.late_s()))
        else:
            raise ProtocolError("a second hello")

    def _greet(self, message: Any) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError("no hello")
        secret = self._server.secret
        hello = self._server.hello
        if secret:
            hello = msgspec.structs.replace(hello, nonce=new_nonce())
            hello = msgspec.structs.replace(hello, proof=worker_proof(secret, message, hello))
        self.send(hello)  # also to a peer of another version, which can then report ours
        if message.version != PROTOCOL_VERSION:
            assert self.transport is not None
            log.warning("%s speaks version %d", self.peer, message.version)
            self.transport.close()
            return
        if secret:
            self._awaited_proof = frontend_proof(secret, message, hello)
        else:
            self._admit()

    def _check_proof(self, message: Any) -> None:
        if not isinstance(message, Proof) or not same(message.proof, self._awaited_proof):
            raise ProtocolError("no proof that it knows the secret")
        self._admit()

    def _admit(self) -> None:
        self._greeted = True
        if self._handshake_deadline is not None:
            self._handshake_deadline.cancel()
        if self._server.draining:
            self.announce_drain()

    def announce_drain(self) -> None:
        if self._greeted:  # `_admit` informs the others
            self.send(Draining())

    def disconnected(self, reason: str) -> None:
        if self._handshake_deadline is not None:
            self._handshake_deadline.cancel()
        self._server.forget(self, reason)


class RpcServer:
    """Owns the listeners, and knows which frontend each running request belongs to."""

    def __init__(
        self,
        handler: RpcHandler,
        instance_id: str,
        epoch: int,
        *,
        secret: bytes = b"",
        stall_s: float = STALL_S,
        handshake_s: float = HANDSHAKE_S,
        late_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """With a `secret`, serves only frontends that prove to know it. `late_s()` is what pings
        are answered with."""
        self.secret, self.late_s = secret, late_s
        self.hello = Hello(PROTOCOL_VERSION, instance_id, epoch, pings=True)
        self.stall_s, self.handshake_s = stall_s, handshake_s
        self.draining = False
        self._handler = handler
        self._connections: set[FrontendConnection] = set()
        self._owners: dict[str, FrontendConnection] = {}
        self._listeners: list[asyncio.Server] = []
        self._unix: tuple[str, int] | None = None

    async def start(self, host: str, unix_path: str | None = None) -> list[str]:
        """Listen on an ephemeral TCP port of `host` and on `unix_path`.

        Returns the addresses, the preferred one first. An unusable path is left out with a warning,
        because TCP is only slower. Raises OSError when it cannot listen on `host`.
        """
        loop = asyncio.get_running_loop()
        addresses = []
        if unix_path is not None:
            try:
                listener = await loop.create_unix_server(self._accept, unix_path)
            except OSError as exc:
                log.warning("no unix socket at %s: %s", unix_path, exc)
            else:
                os.chmod(unix_path, 0o600)
                self._unix = (unix_path, os.stat(unix_path).st_ino)
                self._listeners.append(listener)
                addresses.append(f"unix:{unix_path}")
        listener = await loop.create_server(self._accept, host, 0)
        self._listeners.append(listener)
        port = listener.sockets[0].getsockname()[1]
        addresses.append(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        return addresses

    @property
    def num_live(self) -> int:
        """Requests whose last output was not sent yet."""
        return len(self._owners)

    @property
    def num_frontends(self) -> int:
        """Connections, including those whose handshake is not complete."""
        return len(self._connections)

    def send(self, outputs: list[EngineOutput]) -> None:
        """Deliver what one engine step produced: one frame per frontend.

        Drops the outputs of requests that were aborted.
        """
        batches: dict[FrontendConnection, list[EngineOutput]] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            batches.setdefault(owner, []).append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
                owner.live.discard(output.request_id)
        for owner, batch in batches.items():
            try:
                owner.send(Step(batch))
            except Exception:
                log.exception("a step of %d outputs could not be encoded", len(batch))
                self._send_one_by_one(owner, batch)

    def _send_one_by_one(self, owner: FrontendConnection, batch: list[EngineOutput]) -> None:
        """So that an output that cannot be sent ends its own request only."""
        for output in batch:
            try:
                owner.send(Step([output]))
            except Exception as exc:
                error = ErrorInfo("EngineFailed", f"its output cannot be sent: {exc}")
                owner.send(Step([EngineOutput(output.request_id, [], "error", error=error)]))
                if output.finish_reason is None:
                    self.abort(owner, output.request_id)

    def announce_drain(self) -> None:
        """Ask all frontends, present and future, to send no more requests."""
        self.draining = True
        for connection in self._connections:
            connection.announce_drain()

    async def close(self) -> None:
        """Stop listening, disconnect all frontends, and abort their running requests."""
        for listener in self._listeners:
            listener.close()
        await asyncio.gather(*(connection.close() for connection in self._connections))
        for listener in self._listeners:
            await listener.wait_closed()
        self._listeners.clear()
        if self._unix is not None:
            path, inode = self._unix
            # A successor may already listen under the same name.
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            self._unix = None

    # --- called by connections -----------------------------------------------------------------

    def _accept(self) -> FrontendConnection:
        return FrontendConnection(self)

    def remember(self, connection: FrontendConnection) -> None:
        self._connections.add(connection)

    def generate(self, connection: FrontendConnection, request: EngineRequest) -> None:
        request_id = request.request_id
        owner = self._owners.get(request_id)
        if owner is connection:
            raise ProtocolError(f"the request {request_id} twice")
        if owner is not None:
            taken = InvalidRequest(f"{request_id} is already running for another frontend")
            connection.send(
                Step([EngineOutput(request_id, [], "error", error=ErrorInfo.from_error(taken))])
            )
            return
        self._owners[request_id] = connection
        connection.live.add(request_id)
        try:
            self._handler.on_generate(request)
        except ServingError as exc:
            self._refuse(request_id, exc)
        except Exception as exc:
            log.exception("%s could not be started", request_id)
            self._refuse(request_id, EngineFailed(f"{type(exc).__name__}: {exc}"))

    def _refuse(self, request_id: str, exc: ServingError) -> None:
        self.send([EngineOutput(request_id, [], "error", error=ErrorInfo.from_error(exc))])

    def abort(self, connection: FrontendConnection, request_id: str) -> None:
        if self._owners.get(request_id) is not connection:
            return  # finished meanwhile
        del self._owners[request_id]
        connection.live.discard(request_id)
        try:
            self._handler.on_abort(request_id)
        except Exception:
            log.exception("%s could not be aborted", request_id)

    def release(self, request_id: str) -> None:
        try:
            self._handler.on_release(request_id)
        except Exception:
            log.exception("%s could not be released", request_id)

    def forget(self, connection: FrontendConnection, reason: str) -> None:
        self._connections.discard(connection)
        if connection.live:
            log.info("a frontend left (%s): aborting %d requests", reason, len(connection.live))
        for request_id in list(connection.live):
            self.abort(connection, request_id)
