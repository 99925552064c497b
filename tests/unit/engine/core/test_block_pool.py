"""Held, cached and free blocks, and the events that say what the cache holds."""

from __future__ import annotations

import random

import pytest
from serving.engine.core.block_pool import BlockPool
from serving.protocol import BlocksRemoved, BlocksStored


def test_released_blocks_are_found_again_by_their_hashes() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert 0 not in blocks  # block 0 pads tables
    assert pool.store(blocks[:2], [11, 12], None) == blocks[:2]
    pool.release(blocks)
    assert pool.match([11, 12, 13]) == blocks[:2]
    assert (pool.num_cached, pool.num_held, pool.num_available) == (2, 0, 4)
    pool.hold(blocks[:2])
    assert (pool.num_cached, pool.num_held) == (0, 2)
    pool.check_integrity([blocks[:2]])


def test_eviction_takes_leaves_of_the_least_recently_used_first() -> None:
    pool = BlockPool(4)
    old = pool.allocate(2)
    pool.store(old, [1, 2], None)
    new = pool.allocate(2)
    pool.store(new, [3, 4], None)
    pool.release(old)
    pool.release(new)
    pool.take_events()
    evicted = []
    for _ in range(4):
        pool.allocate(1)
        evicted += [h for e in pool.take_events() for h in e.block_hashes]  # type: ignore[union-attr]
    assert evicted == [2, 1, 4, 3]


def test_same_content_is_kept_once_and_reported_once() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.store(first, [1, 2], None)
    kept = pool.store(second, [1, 2, 3], None)
    assert kept == [*first, second[2]]
    assert pool.take_events() == [BlocksStored(None, [1, 2]), BlocksStored(2, [3])]
    pool.check_integrity([first, kept])
    pool.release(first)
    assert pool.match([1, 2, 3]) == kept
    pool.release(kept)
    assert pool.num_available == 6


def test_fits_does_not_count_matched_blocks_as_room() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.store(blocks, [1, 2], None)
    pool.release(blocks)
    assert pool.fits([], 3)
    assert pool.fits(blocks, 1)
    assert not pool.fits(blocks, 2)


def test_integrity_check_sees_a_lost_reference() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="refs"):
        pool.check_integrity([blocks, blocks[:1]])


def test_random_use_keeps_events_equal_to_the_cache() -> None:
    rng = random.Random(5)
    pool, held, told = BlockPool(12), [], set()
    for _ in range(3000):
        if held and (pool.num_available < 4 or rng.random() < 0.5):
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            stem = rng.randrange(4)
            hashes = [stem * 10 + depth for depth in range(rng.randrange(1, 4))]
            matched = pool.match(hashes)
            pool.hold(matched)
            blocks = matched + pool.allocate(len(hashes) - len(matched) + 1)
            parent = hashes[len(matched) - 1] if matched else None
            new = slice(len(matched), len(hashes))
            blocks[new] = pool.store(blocks[new], hashes[new], parent)
            held.append(blocks)
        for event in pool.take_events():
            if isinstance(event, BlocksStored):
                assert not told & set(event.block_hashes)
                told |= set(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                assert told >= set(event.block_hashes)
                told -= set(event.block_hashes)
        assert told == pool.stored_hashes()
        pool.check_integrity(held)


def test_a_duplicate_that_a_step_still_reads_is_kept() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    assert pool.store(first, [7], None) == first
    assert pool.store(second, [7], None, are_read=True) == second
    pool.check_integrity([first, second])
    pool.release(second)
    assert (pool.num_held, pool.match([7])) == (1, first)
