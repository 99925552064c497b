"""Between generating and writing: new text that the client has not been sent yet.

A slow client gets fewer and larger chunks, and never slows a worker down.
"""

from __future__ import annotations

import asyncio

from serving.text.detokenize import Delta

MAX_SEPARATE = 256
"""Deltas of one choice that may wait for a slow client before they are merged into one."""


class DeltaBuffer:
    """Deltas of all choices of one response, generated and not yet taken. It has one taker.

    Each token stays a delta of its own, unless more than MAX_SEPARATE wait. With `is_whole`, nobody
    takes before the end. A bare future wakes the taker, once per token; an Event costs twice as
    much.
    """

    def __init__(self, *, is_whole: bool) -> None:
        self._is_whole = is_whole
        self._pending: dict[int, list[Delta]] = {}
        self._taker: asyncio.Future[None] | None = None
        self._is_closed = False
        self._error: Exception | None = None

    def put(self, index: int, *deltas: Delta) -> None:
        """Add deltas of choice `index`."""
        pending = self._pending.setdefault(index, [])
        pending += deltas
        if len(pending) > MAX_SEPARATE and not self._is_whole:
            pending[:] = [Delta.merged(pending)]
        if self._taker is not None:
            self._wake()

    def close(self, error: Exception | None = None) -> None:
        """There will be no more deltas. `error` is the reason, if generating failed."""
        self._is_closed, self._error = True, error
        self._wake()

    async def take(self) -> dict[int, list[Delta]]:
        """New deltas by choice; waits until there are some. Empty at the end.

        Raises the error that ended the generation, after everything before it was taken.
        """
        if not (self._pending or self._is_closed):
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        pending, self._pending = self._pending, {}
        if not pending and self._error is not None:
            raise self._error
        return pending

    def take_all(self) -> dict[int, Delta]:
        """Everything, after `close`. Raises the error that ended the generation."""
        if self._error is not None:
            raise self._error
        return {index: Delta.merged(deltas) for index, deltas in self._pending.items()}

    def _wake(self) -> None:
        taker, self._taker = self._taker, None
        if taker is not None and not taker.done():  # Done: the taker was cancelled.
            taker.set_result(None)
