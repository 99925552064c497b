"""Cancelling work that touches memory."""

from __future__ import annotations

import asyncio
import threading

import pytest
from serving.kv_transfer.cancellation import finish


async def test_cancellation_waits_for_the_copy_under_way() -> None:
    ended = threading.Event()
    loop = asyncio.get_running_loop()

    async def copying() -> None:
        await finish(loop.run_in_executor(None, lambda: (ended.wait(0.2), ended.set())))

    task = asyncio.create_task(copying())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
