"""Blocks read where they are, with a stand-in for the GPU's driver: both ends in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os

import msgspec
import numpy as np
import pytest
from kv_ends import (
    Got,
    GpuInHostMemory,
    HeldInPool,
    params,
    pulling,
    random_blocks,
    serving,
)
from kv_peers import pull_all, relay
from serving.errors import KvTransferFailed
from serving.kv_layout import KvLayout
from serving.kv_transfer.messages import MAX_BLOCKS_IN_PLACE
from waiting import until

NAME = "tcp-gpu"


async def test_blocks_are_handed_on_where_they_are() -> None:
    blocks = random_blocks(20)
    held = HeldInPool(a=blocks, b=random_blocks(9, seed=2))
    async with serving(NAME, held) as source, pulling(NAME) as end:
        got = await pull_all(end, source.address, "a", blocks)
        assert got.in_place
        assert got.calls == [(0, 20)]
        assert "in place" in end.route
        await until(lambda: held.done_with == ["a"])
        assert held.num_lent == 0


async def test_part_of_a_prompt_while_more_follows() -> None:
    blocks = random_blocks(12)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        got = Got(blocks)
        asked = params(source.address, "a", 12)
        await end.pull(asked, 2, 5, got, more_follows=True)
        await end.pull(asked, 7, 5, got)
        await until(lambda: held.done_with == ["a"])
    assert np.array_equal(got.blocks[2:], blocks[2:])
    assert not got.blocks[:2].any()


async def test_more_blocks_than_one_message_can_name_take_several_messages() -> None:
    tiny = KvLayout.uniform(
        num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="bfloat16"
    )
    blocks = random_blocks(2 * MAX_BLOCKS_IN_PLACE + 4, tiny)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held, tiny) as source, pulling(NAME, tiny) as end:
        got = Got(blocks)
        asked = params(source.address, "a", len(blocks), tiny)
        assert await end.pull(asked, 0, len(blocks), got) == blocks.nbytes
        assert np.array_equal(got.blocks, blocks)
        counts = [count for _, count in got.calls]
        assert counts == [MAX_BLOCKS_IN_PLACE, MAX_BLOCKS_IN_PLACE, 4]
        await until(lambda: held.done_with == ["a"])
        assert held.num_lent == 0


@pytest.mark.parametrize("declining", ["puller", "source"])
async def test_puller_and_source_can_each_decline_to_read_in_place(declining: str) -> None:
    blocks = random_blocks(5)
    held = HeldInPool(a=blocks)
    held.read = lambda request_id, first, out: None  # type: ignore[method-assign]
    async with (
        serving(NAME, held, in_place=declining != "source") as source,
        pulling(NAME, in_place=declining != "puller") as end,
    ):
        got = Got(blocks)
        await end.pull(params(source.address, "a", 5), 0, 5, got)
    assert not got.in_place


async def test_a_pool_that_cannot_be_shared_is_staged(caplog: pytest.LogCaptureFixture) -> None:
    blocks = random_blocks(5)
    held = HeldInPool(a=blocks)
    held.read = lambda request_id, first, out: None  # type: ignore[method-assign]
    async with (
        serving(NAME, held, gpu=GpuInHostMemory(maps=False)) as source,
        pulling(NAME) as end,
    ):
        got = Got(blocks)
        await end.pull(params(source.address, "a", 5), 0, 5, got)
    assert not got.in_place
    assert "cannot be shared: memory of a kind" in caplog.text


@pytest.mark.parametrize(
    ("request_id", "nonce", "why"),
    [("a", "guessed", "wrong nonce"), ("b", "n-b", "not held here")],
)
async def test_a_peer_without_the_nonce_gets_no_block(
    request_id: str, nonce: str, why: str
) -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        asked = msgspec.structs.replace(params(source.address, request_id, 4), nonce=nonce)
        with pytest.raises(KvTransferFailed, match=why):
            await end.pull(asked, 0, 4, Got(blocks))
        await pull_all(end, source.address, "a", blocks)


async def test_blocks_released_meanwhile_are_refused() -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    held.error = KeyError("a")
    async with serving(NAME, held) as source, pulling(NAME) as end:
        with pytest.raises(KvTransferFailed, match="not held here"):
            await end.pull(params(source.address, "a", 4), 0, 4, Got(blocks))
        held.error = None
        await pull_all(end, source.address, "a", blocks)


async def test_a_failing_sink_ends_the_loan_and_keeps_the_channel() -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        got = Got(blocks)
        got.error = RuntimeError("no room")
        with pytest.raises(RuntimeError, match="no room"):
            await end.pull(params(source.address, "a", 4), 0, 4, got)
        await until(lambda: held.num_lent == 0)
        assert held.done_with == []
        await pull_all(end, source.address, "a", blocks)


async def test_a_cancelled_pull_ends_the_loan_only_when_its_copy_is_over() -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        got = Got(blocks)
        got.pause_s = 0.3
        pull = asyncio.create_task(end.pull(params(source.address, "a", 4), 0, 4, got))
        await until(got.started.is_set)
        pull.cancel()
        await asyncio.sleep(0.1)
        assert held.num_lent == 4
        with pytest.raises(asyncio.CancelledError):
            await pull
        assert got.ended.is_set()
        await until(lambda: held.num_lent == 0)
        await pull_all(end, source.address, "a", blocks)


async def test_pull_fails_when_the_source_released_the_blocks_during_the_read() -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held, transfer_s=0.1) as source, pulling(NAME) as end:
        got = Got(blocks)
        got.pause_s = 0.5
        with pytest.raises(KvTransferFailed, match="let go of the blocks"):
            await end.pull(params(source.address, "a", 4), 0, 4, got)
        assert held.num_lent == 0
        assert held.done_with == []


async def test_a_lost_connection_ends_the_loan() -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with (
        serving(NAME, held) as source,
        relay(source.address) as (address, cut),
        pulling(NAME) as end,
    ):
        got = Got(blocks)
        got.pause_s = 0.3
        pull = asyncio.create_task(end.pull(params(address, "a", 4), 0, 4, got))
        await until(got.started.is_set)
        await cut()
        await until(lambda: held.num_lent == 0)
        with pytest.raises(KvTransferFailed, match="let go of the blocks"):
            await pull


async def test_an_idle_channel_is_closed_as_soon_as_its_peer_leaves() -> None:
    """It would keep the memory of a process that has ended."""
    blocks = random_blocks(4)
    async with pulling(NAME) as end:
        before = num_sockets()
        async with serving(NAME, HeldInPool(a=blocks)) as source:
            await pull_all(end, source.address, "a", blocks)
            assert num_sockets() == before + 3  # the listener, and both ends of one connection
        await until(lambda: num_sockets() == before)


def num_sockets() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(link.startswith("socket:") for link in links)
