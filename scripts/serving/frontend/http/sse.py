"""Deltas to server-sent events: one write for all deltas that are ready.

While a write waits for a slow client, new deltas collect in the `DeltaBuffer`, and the next write
sends them together. Nothing is sent before the first delta, so that early errors keep their status
code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.types import Send

from serving.frontend.api.errors import ApiError, to_api_error
from serving.frontend.http.generation import Generation
from serving.frontend.http.limits import ClientGone

STALL_S = 120.0
"""A client that accepts no byte for this long counts as gone."""

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect chunks
)


class _ClientOutput:
    """Writes to one client, and stops when a write takes longer than `stall_s` to twice that.

    It uses one slow timer per stream. A timeout per write would cost as much as detokenizing.
    """

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s
        self._num_writes = self._num_writes_before = 0
        self._writing = False

    @asynccontextmanager
    async def guarded(self) -> AsyncIterator[None]:
        """Raises ClientGone out of a `write` that stalls inside."""
        self._check_later()
        try:
            async with asyncio.timeout(None) as self._timeout:
                yield
        except OSError:  # A stall (TimeoutError), or the server's error when the client has left.
            raise ClientGone from None
        finally:
            self._timer.cancel()
            del self._timer  # It refers to `self`: a cycle for the garbage collector.

    def _check_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._check)

    def _check(self) -> None:
        if self._writing and self._num_writes == self._num_writes_before:
            self._timeout.reschedule(asyncio.get_running_loop().time())
            return
        self._num_writes_before = self._num_writes
        self._check_later()

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self._writing = True
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing = False
        self._num_writes += 1


async def send_deltas(
    generation: Generation,
    send: Send,
    headers: Sequence[tuple[bytes, bytes]],
    stall_s: float,
) -> ApiError | None:
    """Write everything but the end while `generation` runs. Returns the error that ended it.

    Raises the error itself if nothing was sent before it. Raises ClientGone on a stall.
    """
    take, chunks = generation.deltas.take, generation.plan.writer.chunks
    ready = await take()
    output = _ClientOutput(send, stall_s)
    async with output.guarded():
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
        opening = generation.plan.writer.opening()
        while ready:
            events = [chunks(index, deltas) for index, deltas in ready.items()]
            await output.write(b"".join([opening, *events]) if opening else b"".join(events))
            opening = b""
            try:
                ready = await take()
            except Exception as exc:
                return to_api_error(exc)
    return None


async def end_stream(
    generation: Generation, error: ApiError | None, send: Send, stall_s: float
) -> None:
    """Write the end, which is `error` if there is one. Raises ClientGone on a stall."""
    writer = generation.plan.writer
    body = writer.closing(generation.usage()) if error is None else writer.failure(error)
    output = _ClientOutput(send, stall_s)
    async with output.guarded():
        await output.write(body, more=False)
