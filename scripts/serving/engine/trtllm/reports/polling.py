"""Polls KV events and statistics, since the library pushes neither.

The library returns one iterator. It ends when nothing came for its timeout, and stays ended until
the next request is submitted. Some versions block the event loop during that timeout, so it is
short, and the pauses are here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

TIMEOUT_S = 0.005
BUSY_S = 0.05
IDLE_S = 0.25
FAILED_S = 5.0


async def drain(ask: Callable[..., Any], take: Callable[[dict[str, Any]], None]) -> int:
    """Take everything that has come, and return how much. Raises what the library raises."""
    answers = ask(timeout=TIMEOUT_S)
    # Otherwise events that come after its end wait for the next request.
    mark_undone = getattr(answers, "mark_undone", None)
    if mark_undone is not None:
        mark_undone()
    count = 0
    async for answer in answers:
        for item in answer if isinstance(answer, list) else [answer]:
            take(item)
            count += 1
    return count


async def poll_forever(
    what: str,
    ask: Callable[..., Any],
    take: Callable[[dict[str, Any]], None],
    is_busy: Callable[[], bool],
    failed_s: float = FAILED_S,
) -> None:
    """`drain` until cancelled. A failure is logged once, and polling goes on after `failed_s`."""
    is_failing = False
    while True:
        try:
            count = await drain(ask, take)
        except Exception as exc:
            if not is_failing:
                log.exception("TensorRT-LLM's %s could not be read", what)
            is_failing = True
            log.debug("%s: %s", what, exc)
            await asyncio.sleep(failed_s)
            continue
        is_failing = False
        await asyncio.sleep(BUSY_S if count or is_busy() else IDLE_S)
