"""Blocks read where they are, with a stand-in for the GPU's driver: both ends in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from kv_contract import pull_all, relay
from kv_ends import Got, HeldInPool, params, pulling, random_blocks, serving, until
from serving.errors import KvTransferFailed

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


async def test_more_blocks_than_one_message_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.kv_transfer.pull.MAX_BLOCKS_IN_PLACE", 8)
    blocks = random_blocks(20)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        got = await pull_all(end, source.address, "a", blocks)
        assert [count for _, count in got.calls] == [8, 8, 4]
        await until(lambda: held.done_with == ["a"])
        assert held.num_lent == 0


@pytest.mark.parametrize("side", ["puller", "source"])
async def test_either_side_can_decline(side: str) -> None:
    blocks = random_blocks(5)
    held = HeldInPool(a=blocks)
    held.read = lambda request_id, first, out: None  # type: ignore[method-assign]
    async with (
        serving(NAME, held, in_place=side != "source") as source,
        pulling(NAME, in_place=side != "puller") as end,
    ):
        got = Got(blocks)
        await end.pull(params(source.address, "a", 5), 0, 5, got)
    assert not got.in_place


async def test_a_pool_that_cannot_be_shared_is_staged(caplog: pytest.LogCaptureFixture) -> None:
    blocks = random_blocks(5)
    held = HeldInPool(a=blocks)
    held.read = lambda request_id, first, out: None  # type: ignore[method-assign]
    async with pulling(NAME) as end:
        from kv_ends import transfer

        source: Any = transfer(NAME)
        source.gpu.maps = False
        await source.serve(held)
        try:
            got = Got(blocks)
            await end.pull(params(source.address, "a", 5), 0, 5, got)
        finally:
            await source.close()
    assert not got.in_place
    assert "cannot be shared: memory of a kind" in caplog.text


@pytest.mark.parametrize(
    ("request_id", "nonce", "why"),
    [("a", "guessed", "wrong nonce"), ("b", "n-b", "not held here")],
)
async def test_strangers_learn_no_block(request_id: str, nonce: str, why: str) -> None:
    blocks = random_blocks(4)
    held = HeldInPool(a=blocks)
    async with serving(NAME, held) as source, pulling(NAME) as end:
        import msgspec

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


async def test_a_failing_sink_ends_the_loan_and_not_the_link() -> None:
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


async def test_what_was_read_after_the_source_let_go_does_not_count() -> None:
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


async def test_an_idle_link_to_a_peer_that_left_is_given_up_at_once() -> None:
    """It would keep the memory of a process that is gone."""
    blocks = random_blocks(4)
    async with pulling(NAME) as end:
        async with serving(NAME, HeldInPool(a=blocks)) as source:
            await pull_all(end, source.address, "a", blocks)
            idle = end._puller._idle[source.address]  # type: ignore[attr-defined]
            assert len(idle) == 1
        await until(lambda: not idle)
