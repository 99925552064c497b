"""A decode that starts while its prefill is still running.

It fetches the prompt's blocks as they are computed, so that only the last ones are missing when
the first token arrives. It is an optimisation: if it fails before its first output, the request is
decoded as if the early decode had never started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

from serving.frontend.stream import Outputs
from serving.protocol import EngineOutput


class EarlyDecode:
    """At most one decode of a request. An async iterator of its outputs; close it in any case."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = None
        self._first: asyncio.Task[EngineOutput] | None = None
        self._is_first_taken = False

    @property
    def is_started(self) -> bool:
        return self._first is not None

    def start(self, open_stream: Callable[[], Outputs]) -> None:
        """Open the stream in a task and run it up to its first output. It waits there."""
        assert self._first is None, "one early decode per request"
        self._first = asyncio.create_task(self._run(open_stream), name="early-decode")

    async def _run(self, open_stream: Callable[[], Outputs]) -> EngineOutput:
        self._outputs = open_stream()
        return await anext(self._outputs)

    async def wait_for_first(self) -> None:
        """Wait until the first output is there. Raises what the decode raises."""
        assert self._first is not None
        await asyncio.shield(self._first)  # `aclose` cancels it.

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[EngineOutput]:
        # Not a coroutine of its own: one more per token would cost.
        if not self._is_first_taken:
            assert self._first is not None
            self._is_first_taken = True
            return self._first
        assert self._outputs is not None
        return anext(self._outputs)

    async def aclose(self) -> None:
        """End the decode, if there is one."""
        first, self._first = self._first, None
        if first is not None:
            first.cancel()
            await asyncio.wait([first])
            if not first.cancelled():
                first.exception()  # Nobody wants to know any more.
        if self._outputs is not None:
            await self._outputs.aclose()
