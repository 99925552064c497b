"""KV transfer over plain TCP."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
from kv_contract import TransferContract, pull_all
from kv_ends import Held, pulling, random_blocks, serving
from serving.kv_transfer.link import finish
from serving.kv_transfer.staging import StagingPool


class TestTcp(TransferContract):
    name = "tcp"


async def test_close_leaves_no_descriptor_and_no_thread() -> None:
    blocks = random_blocks(20)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with serving("tcp", Held(a=blocks)) as source, pulling("tcp") as end:
            await pull_all(end, source.address, "a", blocks)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-transfer")]


async def test_staging_serves_in_order_and_reuses_buffers() -> None:
    pool = StagingPool(4096, 2)
    order = []

    async def use(name: str, count: int) -> None:
        async with pool.lease(count) as lease:
            order.append(name)
            assert len({buffer.ctypes.data for buffer in lease.buffers}) == count
            await asyncio.sleep(0.01)

    await asyncio.gather(use("a", 1), use("b", 2), use("c", 1))
    assert order == ["a", "b", "c"]  # c does not overtake b although there was room for it
    assert pool.available == 2


async def test_staging_loses_nothing_to_cancelled_waiters() -> None:
    pool = StagingPool(4096, 2)

    async def wait_for(count: int) -> None:
        async with pool.lease(count):
            await asyncio.sleep(10)

    async with pool.lease(2):
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


async def test_quarantined_buffer_returns_only_when_the_transport_let_go() -> None:
    pool = StagingPool(4096, 2)
    held_by_transport: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with pool.lease(1) as lease:
        lease.quarantine([held_by_transport])
    assert pool.available == 1
    held_by_transport.set_result(None)
    await asyncio.sleep(0)
    assert pool.available == 2


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
