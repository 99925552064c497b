"""Waiting for something that happens elsewhere, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Lets other tasks run until the condition is true. Fails after the deadline."""
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends, f"not true within {deadline_s} s"
        await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], deadline_s: float = 20.0, what: str = "it") -> None:
    """Blocks until the condition is true. Fails after the deadline."""
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends, f"not within {deadline_s} s: {what}"
        time.sleep(0.05)
