"""Ends a worker whose engine computes nothing any more, so that it can be replaced.

Such a worker would keep its registration and its connections, and answer every request with an
error, or with nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

from serving.engine.base import Engine
from serving.errors import OperatorError

log = logging.getLogger(__name__)

POLL_S = 0.25
BROKEN_STATUS = 70
"""Exit status of a worker whose engine is broken (EX_SOFTWARE)."""
EXIT_S = 3.0
"""A worker that has not ended by then ends without cleaning up: a stuck thread, or a stuck device,
never lets go."""


class EngineBroken(OperatorError):
    """The engine of this worker computes nothing any more; only another process can."""

    def __init__(self, instance_id: str, why: str) -> None:
        super().__init__(
            f"the engine of {instance_id} is broken: {why}",
            remedy="the worker ends now and is replaced (`deployment.restart`); its log has the "
            "cause, further up",
        )


async def watch_engine(
    engine: Engine, instance_id: str, hang_s: float, disconnect: Callable[[], Awaitable[None]]
) -> NoReturn:
    """Raises EngineBroken once the engine has failed, or a step is `hang_s` late.

    `disconnect` is called first, so that frontends take their requests elsewhere at once.
    """
    while True:
        health = engine.health()
        why = health.failure
        if not why and health.late_s > hang_s:
            why = f"a step takes {health.late_s:.0f} s longer than it may"
        if why:
            broken = EngineBroken(instance_id, why)
            _end_by_force_after(EXIT_S, broken)
            await asyncio.sleep(0)  # the last outputs are on their way
            await disconnect()
            raise broken
        await asyncio.sleep(POLL_S)


def _end_by_force_after(seconds: float, why: EngineBroken) -> None:
    def end() -> None:
        log.critical("%s", why)
        os._exit(BROKEN_STATUS)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
