"""Waiting for a condition that has no event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

DEADLINE_S = 5.0


async def until(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError if it is not true within DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (it has no event)
            await asyncio.sleep(0.005)
