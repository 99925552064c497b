"""How to be cancelled while a thread or a transport still touches memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Collection, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Awaitable[T]) -> T:
    """Await `work`. When cancelled, let it end first, because it touches memory or releases it."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # cancellation takes precedence; asyncio must not report this one
        raise


async def wait_for_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait for all, or raise the first failure. Unlike `gather`, never cancels the others."""
    if tasks:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()


async def stop(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel all, and wait until they have ended."""
    stopping = list(tasks)
    for task in stopping:
        task.cancel()
    await finish(asyncio.gather(*stopping, return_exceptions=True))
