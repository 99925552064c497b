"""A decode that is started while its prefill is still being computed.

It fetches the prompt's blocks as they come, so that only the last ones are missing when the first
token is there. Nothing depends on it: before its first output it may fail for whatever reason, and
the request is then decoded as if this had not been tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

from serving.protocol import EngineOutput

Outputs = AsyncGenerator[EngineOutput, None]


class EarlyDecode:
    """A context manager: ends the decode, if there is one, when its request is left."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._first: asyncio.Task[EngineOutput] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._first is not None:
            self._first.cancel()
            # Its outcome, which may be a failure, concerns nobody any more.
            await asyncio.wait([self._first])
            if not self._first.cancelled():
                self._first.exception()
        if self._outputs is not None:
            await self._outputs.aclose()

    @property
    def started(self) -> bool:
        return self._first is not None

    def start(self, outputs: Outputs) -> None:
        """Run `outputs` up to its first item, now; it waits there until somebody wants it."""
        assert self._first is None, "one decode per request"
        self._outputs = outputs
        self._first = asyncio.create_task(anext(outputs), name="early-decode")

    async def outputs(self) -> Outputs:
        """The decode's outputs. Raises what it raises."""
        assert self._outputs
        assert self._first
        # Shielded: who leaves cancels it in `__aexit__`.
        yield await asyncio.shield(self._first)
        async for output in self._outputs:
            yield output
