"""A request's body: read within limits of size and time, and decompressed within the same limit."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable

from starlette.types import Receive, Scope

from serving.errors import InvalidRequest, RequestTooLarge
from serving.frontend.http.limits import ArrivingBodies, BodyTimeout, ClientGone

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_NOT_JSON = ("text/plain", "multipart/")
"""Content types that a page can send anywhere without asking, and no client of this API does."""


class UnsupportedMedia(InvalidRequest):
    """The body has a type or an encoding that is not read here (HTTP 415)."""


async def read_body(
    scope: Scope,
    receive: Receive,
    max_bytes: int,
    *,
    timeout_s: float,
    arriving: ArrivingBodies | None = None,
) -> bytes:
    """The whole body, decompressed. While it arrives, its bytes count in `arriving`.

    Raises RequestTooLarge, UnsupportedMedia, BodyTimeout, ClientGone, Overloaded. The announced length is
    checked before reading and the actual one while reading, so never more than `max_bytes` are kept.
    """
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    content_type = headers.get(b"content-type", b"").decode("latin-1").lower()
    if content_type.startswith(_NOT_JSON):
        raise UnsupportedMedia(
            f"The content type `{content_type[:100]}` is not read; send `application/json`",
            code="unsupported_media_type",
        )
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower().strip()
    if encoding != "identity" and encoding not in _WINDOW_BITS:
        raise UnsupportedMedia(
            f"The content encoding `{encoding[:50]}` is not read; send `gzip`, `deflate` or none",
            code="unsupported_content_encoding",
        )
    parts = await _received(receive, max_bytes, timeout_s, arriving or ArrivingBodies())
    if encoding == "identity":
        return b"".join(parts)
    return _decompressed(parts, encoding, max_bytes)


async def _received(
    receive: Receive, max_bytes: int, timeout_s: float, arriving: ArrivingBodies
) -> list[bytes]:
    parts: list[bytes] = []
    num_bytes = counted = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                arriving.add(len(part))
                counted = num_bytes
                parts.append(part)
                if not message.get("more_body", False):
                    return parts
    except TimeoutError:
        raise BodyTimeout(f"The request body did not arrive within {timeout_s:g} s") from None
    finally:
        arriving.add(-counted)


def _decompressed(parts: Iterable[bytes], encoding: str, max_bytes: int) -> bytes:
    """Raises RequestTooLarge for what becomes too large, UnsupportedMedia for what is broken."""
    decompressor = zlib.decompressobj(_WINDOW_BITS[encoding])
    pieces: list[bytes] = []
    left = max_bytes
    try:
        for part in parts:
            pieces.append(decompressor.decompress(part, left + 1))
            left -= len(pieces[-1])
            if left < 0 or decompressor.unconsumed_tail:
                raise _too_large(max_bytes)
    except zlib.error as exc:
        raise UnsupportedMedia(
            f"The request body is not valid {encoding}: {exc}", code="invalid_content_encoding"
        ) from None
    if not decompressor.eof:
        raise UnsupportedMedia(
            f"The request body ends inside its {encoding} data", code="invalid_content_encoding"
        )
    return b"".join(pieces)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"The request body is larger than {max_bytes} bytes", code="request_too_large"
    )
