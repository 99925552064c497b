"""The pool of staging buffers: order, cancellation, quarantine."""

from __future__ import annotations

import asyncio

import pytest
from serving.kv_transfer.staging_pool import StagingPool


async def test_buffers_are_reused_first_come_first_served() -> None:
    pool = StagingPool(4096, 2)
    order = []

    async def use(name: str, count: int) -> None:
        async with pool.borrow(count) as borrowed:
            order.append(name)
            assert len({buffer.ctypes.data for buffer in borrowed.buffers}) == count
            await asyncio.sleep(0.01)

    await asyncio.gather(use("a", 1), use("b", 2), use("c", 1))
    assert order == ["a", "b", "c"]  # c does not overtake b although there was room for it
    assert pool.available == 2


async def test_cancelled_waiters_lose_no_buffer() -> None:
    pool = StagingPool(4096, 2)

    async def wait_for(count: int) -> None:
        async with pool.borrow(count):
            await asyncio.sleep(10)

    async with pool.borrow(2):
        waiting = asyncio.create_task(wait_for(1))
        served = asyncio.create_task(wait_for(2))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    served.cancel()  # in the very turn of the loop in which it got its buffers
    with pytest.raises(asyncio.CancelledError):
        await served
    assert pool.available == 2


async def test_quarantined_buffer_returns_once_the_transport_no_longer_uses_it() -> None:
    pool = StagingPool(4096, 2)
    held_by_transport: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with pool.borrow(1) as borrowed:
        borrowed.quarantine([held_by_transport])
    assert pool.available == 1
    held_by_transport.set_result(None)
    await asyncio.sleep(0)
    assert pool.available == 2
