"""Where evicted blocks go and how they come back: the books, and copies that keep to them."""

from __future__ import annotations

from typing import Any

import pytest
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.host_tier import Copies, HostTier
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.step import Chunk
from serving.protocol import BlocksRemoved, BlocksStored, EngineRequest, SamplingParams


def cache(pool: BlockPool, hashes: list[int]) -> list[int]:
    """Compute and release a prompt."""
    blocks = pool.allocate(len(hashes))
    pool.store(blocks, hashes, None)
    pool.release(blocks)
    return blocks


def copy(pool: BlockPool) -> Copies:
    copies = pool.take_copies()
    pool.copied(copies)
    return copies


def test_evicted_blocks_go_to_the_host_and_come_back() -> None:
    pool = BlockPool(3, HostTier(4))
    old = cache(pool, [1, 2])
    pool.take_events()
    assert not pool.take_copies()
    held = pool.allocate(3)
    assert pool.take_events() == [
        BlocksStored(None, [1, 2], "host"),
        BlocksRemoved([2, 1]),
    ]
    assert [block for block, _ in copy(pool).offloads] == old[::-1]
    assert pool.match([1, 2]) == []
    assert pool.num_stored([1, 2, 3]) == 2
    pool.release(held)
    blocks, num_stored = pool.claim([], [1, 2, 3], 3)
    assert num_stored == 2
    assert pool.take_events() == [BlocksStored(None, [1, 2])]
    assert [block for _, block in copy(pool).onloads] == blocks[:2]
    assert pool.match([1, 2, 3]) == blocks[:2]
    pool.check_integrity([blocks])


def test_blocks_that_came_back_are_not_copied_again_and_leave_the_host_first() -> None:
    host = HostTier(3)
    pool = BlockPool(3, host)
    cache(pool, [1, 2])
    pool.release(pool.allocate(3))
    copy(pool)
    blocks, _ = pool.claim([], [1, 2], 2)
    copy(pool)
    pool.release(blocks)
    pool.release(pool.allocate(3))  # evicted once more: the host has it
    assert not copy(pool).offloads
    blocks, _ = pool.claim([], [1], 1)
    copy(pool)
    other = pool.allocate(2)
    pool.store(other, [8, 9], None)
    pool.release(other)
    pool.allocate(2)
    copy(pool)
    assert host.stored_hashes() == {2, 8, 9}  # 1 is on the device
    pool.check_integrity([blocks, other])


def test_least_recently_evicted_leaves_the_host_first() -> None:
    pool = BlockPool(2, HostTier(3))
    for hashes in ([1, 2], [3, 4], [5, 6]):
        cache(pool, hashes)
        copy(pool)
    pool.take_events()
    pool.allocate(2)
    assert pool.take_events() == [
        BlocksRemoved([1, 4], "host"),
        BlocksStored(None, [5, 6], "host"),
        BlocksRemoved([6, 5]),
    ]
    assert pool.host.stored_hashes() == {3, 5, 6}


def test_a_host_block_is_not_reused_while_a_copy_uses_it() -> None:
    pool = BlockPool(4, HostTier(2))
    cache(pool, [1, 2])
    cache(pool, [3, 4])
    held = pool.allocate(4)  # two of four find room; those are pinned
    assert len(pool.take_copies().offloads) == 2
    assert pool.host.stored_hashes() == {1, 2}
    pool.check_integrity([held])


def test_a_claim_does_not_evict_the_blocks_that_it_claims() -> None:
    pool = BlockPool(2, HostTier(2))
    cache(pool, [1, 2])
    cache(pool, [3, 4])  # 1 and 2 go to the host
    copy(pool)
    blocks, num_stored = pool.claim([], [1, 2], 2)  # for which 3 and 4 are evicted
    assert num_stored == 2
    copies = copy(pool)
    assert len(copies.onloads) == 2
    assert copies.offloads == []  # no room for them: 1 and 2 were pinned
    pool.check_integrity([blocks])


def test_an_eviction_cancels_an_onload_that_is_still_planned() -> None:
    pool = BlockPool(2, HostTier(2))
    cache(pool, [1, 2])
    pool.release(pool.allocate(2))
    copy(pool)
    blocks, _ = pool.claim([], [1, 2], 2)
    pool.release(blocks)  # aborted
    held = pool.allocate(2)
    assert not pool.take_copies()
    assert pool.num_stored([1, 2]) == 2
    pool.check_integrity([held])


def test_a_sequence_keeps_its_block_while_the_stored_block_is_not_copied_yet() -> None:
    pool = BlockPool(4, HostTier(2))
    cache(pool, [1])
    pool.release(pool.allocate(4))
    copy(pool)
    mine = pool.allocate(1)
    theirs, _ = pool.claim([], [1], 1)
    copies = pool.take_copies()
    assert pool.store(mine, [1], None) == mine
    pool.copied(copies)
    again = pool.allocate(1)
    assert pool.store(again, [1], None) == theirs
    pool.check_integrity([mine, theirs, theirs])


def test_callbacks_wait_for_all_copies_planned_before() -> None:
    pool, called = BlockPool(2, HostTier(8)), []
    pool.host.when_copied(lambda: called.append("none"))
    cache(pool, [1])
    pool.allocate(2)
    pool.host.when_copied(lambda: called.append("first"))
    first = pool.take_copies()
    pool.release([1])
    cache(pool, [2])
    pool.allocate(1)
    pool.host.when_copied(lambda: called.append("second"))
    second = pool.take_copies()
    assert called == ["none"]
    pool.copied(first)
    assert called == ["none", "first"]
    pool.copied(second)
    assert called == ["none", "first", "second"]


# --- with a scheduler ----------------------------------------------------------------------------


def scheduler(num_blocks: int, num_host_blocks: int) -> Scheduler:
    limits = SchedulerLimits(
        block_size=4, max_model_len=64, max_batch_size=8, max_num_batched_tokens=32, max_waiting=8
    )
    return Scheduler(BlockPool(num_blocks, HostTier(num_host_blocks)), limits)


def sequence(name: str, tokens: list[int], arrival: int, **more: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=1, temperature=0)
    return Sequence(EngineRequest(name, tokens, len(tokens), sampling, **more), arrival, 1, 4)


def step(books: Scheduler) -> list[Chunk]:
    chunks, copies = books.plan_step()
    books.launched(chunks)
    books.pool.copied(copies)
    num_samples = sum(chunk.samples for chunk in chunks)
    books.complete(chunks, [7] * num_samples, [None] * num_samples)
    books.admit_reservations()
    books.check_integrity()
    return chunks


def test_a_prompt_found_on_the_host_is_computed_from_there_on() -> None:
    books = scheduler(6, 8)
    books.add(sequence("a", list(range(20)), 1))
    step(books)
    books.add(sequence("b", list(range(100, 121)), 2))
    step(books)
    assert books.load().host_cached_blocks == 5
    again = sequence("c", list(range(20)), 3)
    books.add(again)
    [chunk] = step(books)
    assert (chunk.start, chunk.length) == (16, 4)
    assert again.num_cached == 16
    assert books.load().onloaded_blocks == 4


def test_a_reservation_is_filled_only_after_its_evictions_are_copied() -> None:
    books = scheduler(5, 8)
    books.add(sequence("a", list(range(17)), 1))
    step(books)
    settled: list[str] = []
    fetched = sequence("b", list(range(100, 117)), 2, phase="decode")
    fetched.on_settled = lambda: settled.append("b")
    books.add(fetched)
    books.admit_reservations()
    assert fetched.state is State.RESERVED
    assert settled == []
    assert step(books) == []  # a step of copies only
    assert settled == ["b"]
    books.discard(fetched)
    books.check_integrity()


def test_blocks_are_lent_only_when_they_were_copied() -> None:
    """A prefill's blocks may be fetched while it goes on, by transfers that follow no step."""
    books = scheduler(12, 12)
    books.add(sequence("a", list(range(20)), 1))
    step(books)
    books.add(sequence("b", list(range(100, 145)), 2))
    step(books)
    step(books)
    books.add(sequence("c", list(range(45)), 3, phase="prefill"))
    chunks, copies = books.plan_step()
    assert (chunks[0].start, chunks[0].length) == (20, 25)
    assert len(copies.onloads) > 0
    assert books.num_exportable("c") < 5
    with pytest.raises(KeyError):
        books.lend("c", 0, 5)
    books.pool.copied(copies)
    books.launched(chunks)
    books.complete(chunks, [7], [None])
    assert books.num_exportable("c") >= 5
    blocks = books.lend("c", 0, 5)
    books.take_back(blocks)
    books.abort("c")
    books.check_integrity()


def test_an_abort_reaches_a_reservation_that_waits_for_copies() -> None:
    books = scheduler(5, 8)
    books.add(sequence("a", list(range(17)), 1))
    step(books)
    settled: list[str] = []
    fetched = sequence("b", list(range(100, 117)), 2, phase="decode")
    fetched.on_settled = lambda: settled.append("b")
    books.add(fetched)
    books.admit_reservations()
    books.abort("b")
    assert settled == ["b"]
    assert fetched.state is State.DONE
    step(books)
    books.check_integrity()
