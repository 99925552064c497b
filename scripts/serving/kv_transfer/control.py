"""A control connection: a socket that carries messages, and for TCP also the blocks."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable

import msgspec

from serving.framing import HEADER_BYTES, ProtocolError, body_size, frame
from serving.kv_transfer.messages import Message, decode_message

MAX_FRAME_BYTES = 64 * 1024


def socket_family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class ControlConnection:
    """A connected socket. The task that closes it owns it.

    Raises ConnectionError (or another OSError) when the connection is lost or the peer sends
    garbage; after that only `close` makes sense.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, host: str, port: int) -> ControlConnection:
        sock = socket.socket(socket_family(host), socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            return cls(sock)
        except BaseException:
            sock.close()
            raise

    @property
    def peer_host(self) -> str:
        """The address at the other end of the socket. Raises OSError."""
        host: str = self._sock.getpeername()[0]
        return host

    async def send(self, message: Message) -> None:
        await self._loop.sock_sendall(self._sock, frame(message))

    async def receive(self) -> Message:
        """The next message. A cancelled call may have read a part of it: do not call again."""
        header = bytearray(HEADER_BYTES)
        await self.receive_into(memoryview(header))
        body = bytearray(body_size(header, MAX_FRAME_BYTES))
        await self.receive_into(memoryview(body))
        try:
            message: Message = decode_message(body)
        except msgspec.DecodeError as exc:
            raise ProtocolError(str(exc)) from None
        return message

    async def send_bytes(self, data: memoryview) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def receive_into(self, data: memoryview) -> None:
        """Fill `data` completely."""
        done = 0
        while done < len(data):
            count = await self._loop.sock_recv_into(self._sock, data[done:])
            if not count:
                raise ConnectionResetError("the peer closed the connection")
            done += count

    def watch(self, ended: Callable[[], None] | None) -> None:
        """Call `ended` when the peer closes or sends while nobody uses the connection. None stops
        the watch."""
        self._loop.remove_reader(self._sock)
        if ended is not None:
            self._loop.add_reader(self._sock, ended)

    @property
    def quiet(self) -> bool:
        """Whether the peer has neither closed nor sent, as it must be while nobody uses it."""
        poller = select.poll()  # not select(): descriptors may be above 1023
        poller.register(self._sock, select.POLLIN | select.POLLHUP)
        return self._sock.fileno() >= 0 and not poller.poll(0)

    def close(self) -> None:
        """Only when no other task uses the connection any more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
