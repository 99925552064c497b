"""Frames of msgpack, on every direct connection between two processes of a deployment.

A frame is a little-endian u32 length and a msgpack body of that many bytes. This module does not
know what the messages mean, and owns no socket.
"""

from __future__ import annotations

from typing import Any

import msgspec

HEADER_BYTES = 4

_encode = msgspec.msgpack.Encoder().encode


class ProtocolError(ConnectionError):
    """The peer sent something that does not belong here; the connection cannot go on."""


def frame(message: Any) -> bytes:
    """`message` as one frame."""
    body = _encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def body_size(header: bytes | bytearray | memoryview, limit: int) -> int:
    """Bytes of the body behind `header`. Raises ProtocolError when there are more than `limit`."""
    size = int.from_bytes(header, "little")
    if size > limit:
        raise ProtocolError(f"a frame of {size} bytes")
    return size


class FrameParser:
    """Cuts a byte stream into frame bodies, however the stream arrives."""

    def __init__(self, limit: int) -> None:
        """Bodies have at most `limit` bytes."""
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[memoryview]:
        """Bodies that `data` completes, valid until the next call. Raises ProtocolError."""
        whole: bytes | bytearray = data
        if self._rest:
            self._rest += data
            whole = self._rest
        bodies = []
        view, start, end = memoryview(whole), 0, len(whole)
        while end - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            size = body_size(view[start:body], self._limit)
            if end - body < size:
                break
            bodies.append(view[body : body + size])
            start = body + size
        if start == end:
            self._rest = bytearray()
        elif start or whole is data:
            self._rest = bytearray(view[start:])  # a new buffer: `bodies` look into the old one
        return bodies

    @property
    def num_pending(self) -> int:
        """Bytes kept of a frame that is not complete yet."""
        return len(self._rest)
