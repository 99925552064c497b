"""One end of a direct connection: frames, keep-alive, and a deadline for peers that do not read.

This module does not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from typing import Any, cast

import msgspec

from serving.framing import FrameParser, ProtocolError, frame

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 1024 * 1024
HIGH_WATER_BYTES = 8 * 1024 * 1024
STALL_S = 10.0
"""A peer that leaves more than HIGH_WATER_BYTES unread for this long is disconnected."""
CLOSE_S = 1.0


class RpcConnection(asyncio.Protocol):
    """The part that both ends share."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any], stall_s: float) -> None:
        self._decoder, self._parser = decoder, FrameParser(MAX_FRAME_BYTES)
        self._stall_s = stall_s
        self._stalled: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def received(self, message: Any) -> None:
        """Handle one decoded message. Raises ProtocolError when it does not belong here."""
        raise NotImplementedError

    def disconnected(self, reason: str) -> None:
        """Called once; `reason` is for people."""
        raise NotImplementedError

    def send(self, message: Any) -> None:
        """Queue one frame; nothing happens when the connection is gone."""
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(frame(message))

    def fail(self, reason: str) -> None:
        """Disconnect at once, dropping what is not yet written."""
        if self.transport is not None and not self.transport.is_closing():
            log.warning("closing the connection with %s: %s", self.peer, reason)
            self.transport.abort()

    @property
    def closing(self) -> bool:
        """True from the moment that nothing more can be sent."""
        return self.transport is None or self.transport.is_closing()

    @property
    def peer(self) -> str:
        name = self.transport.get_extra_info("peername") if self.transport else None
        return ":".join(map(str, name[:2])) if isinstance(name, tuple) else "a local peer"

    async def close(self) -> None:
        """Write what is pending, then disconnect; a peer that does not read gets CLOSE_S."""
        if self.transport is None:
            return
        self.transport.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.shield(self.lost)
        except TimeoutError:
            self.transport.abort()
            await self.lost

    # --- called by asyncio ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one by behaviour only
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        with suppress(OSError):  # the peer may be gone already; connection_lost reports it
            _tune(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._parser.feed(data):
                self.received(self._decoder.decode(body))
        except (ProtocolError, msgspec.MsgspecError) as exc:
            self.fail(f"it sent {exc}")

    def pause_writing(self) -> None:
        loop = asyncio.get_running_loop()
        self._stalled = loop.call_later(self._stall_s, self.fail, "it stopped reading")

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        if not self.lost.done():
            self.lost.set_result(None)
        self.disconnected(str(exc) if exc else "connection closed")


def _tune(sock: socket.socket) -> None:
    """Small frames leave at once; a peer whose host vanished is noticed within half a minute."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 25_000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
