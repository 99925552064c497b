"""DeltaBuffer to server-sent events, one write for all that is ready.

While a write waits for a slow client, new deltas merge in `DeltaBuffer`; the next write tells them in
one chunk. Nothing is sent before the first delta, so that early errors keep their status code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.types import Send

from serving.frontend.api.errors import ApiError, to_api_error
from serving.frontend.api.generation import Generation
from serving.frontend.api.limits import ClientGone
from serving.frontend.api.response import DONE

STALL_S = 120.0
"""A client that accepts no byte for this long counts as gone."""

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect chunks
)


class _Output:
    """Writes to one client, and gives it up when a write takes `stall_s` to twice that.

    One slow timer per stream instead of a timeout per write, which would cost as much as
    detokenizing.
    """

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send, self._stall_s = send, stall_s
        self._num_writes = self._num_writes_before = 0
        self._writing = False

    @asynccontextmanager
    async def guarded(self) -> AsyncIterator[None]:
        """Raises ClientGone out of a `write` that stalls inside."""
        self._look_later()
        try:
            async with asyncio.timeout(None) as self._timeout:
                yield
        except OSError:  # a stall (TimeoutError), or a server that says so when the client left
            raise ClientGone from None
        finally:
            self._timer.cancel()
            del self._timer  # It refers to us: that would be garbage for the collector.

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._look)

    def _look(self) -> None:
        if self._writing and self._num_writes == self._num_writes_before:
            self._timeout.reschedule(asyncio.get_running_loop().time())
            return
        self._num_writes_before = self._num_writes
        self._look_later()

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self._writing = True
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._writing = False
        self._num_writes += 1


async def send_deltas(
    generation: Generation,
    send: Send,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    stall_s: float = STALL_S,
) -> ApiError | None:
    """Write all but the end while `generation` runs; returns the error that it ended with.

    Raises what ended the generation before anything was sent, and ClientGone on a stall.
    """
    take, chunks = generation.deltas.take, generation.plan.writer.chunks
    ready = await take()
    output = _Output(send, stall_s)
    async with output.guarded():
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
        while ready:
            await output.write(b"".join([chunks(index, deltas) for index, deltas in ready.items()]))
            try:
                ready = await take()
            except Exception as exc:
                return to_api_error(exc)
    return None


async def end_stream(
    generation: Generation, error: ApiError | None, send: Send, *, stall_s: float = STALL_S
) -> None:
    """Write the end. With an error it has no `[DONE]`: nobody must take it for complete."""
    if error is not None:
        body = b"data: " + error.body() + b"\n\n"
    elif generation.plan.include_usage:
        body = generation.plan.writer.usage_chunk(generation.usage()) + DONE
    else:
        body = DONE
    output = _Output(send, stall_s)
    async with output.guarded():
        await output.write(body, more=False)
