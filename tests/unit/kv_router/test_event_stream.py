"""The index converges to what the instance holds, whatever happens to the events on their way."""

import random

from serving.kv_router.event_stream import IndexCounters, KvEventStream
from serving.kv_router.prefix_index import PrefixIndex
from serving.protocol import BlocksCleared, BlocksRemoved, BlocksStored, KvEventBatch


def batch(seq: int, *events) -> KvEventBatch:
    return KvEventBatch("w0", 1, seq, list(events))


def stored(*hashes: int) -> BlocksStored:
    return BlocksStored(None, list(hashes))


class Setup:
    def __init__(self, max_buffered_blocks: int = 65_536) -> None:
        self.index, self.counters = PrefixIndex(), IndexCounters()
        self.events = KvEventStream(self.index, "w0", self.counters, max_buffered_blocks)

    @property
    def num_blocks(self) -> int:
        return self.index.num_blocks("w0")


def test_batches_from_the_first_on_need_no_snapshot() -> None:
    s = Setup()
    assert not s.events.synchronised
    s.events.on_batch(batch(1, stored(1, 2, 3), BlocksRemoved([3])))
    assert s.events.synchronised
    assert s.index.overlap([1, 2, 3]).blocks == {"w0": 2}
    s.events.on_batch(batch(2, BlocksCleared(), stored(1)))
    assert s.index.overlap([1, 2, 3]).blocks == {"w0": 1}


def test_joining_late_waits_for_a_snapshot_and_replays_what_is_later() -> None:
    s = Setup()
    s.events.on_batch(batch(8, stored(8)))
    s.events.on_batch(batch(9, stored(9)))
    assert not s.events.synchronised
    assert s.num_blocks == 0
    s.events.on_snapshot(8, [1, 2, 8])
    assert s.events.synchronised
    assert s.index.overlap([1, 2, 8, 9]).blocks == {"w0": 4}
    assert s.counters.gaps == 0


def test_a_gap_keeps_the_old_index_until_the_snapshot() -> None:
    s = Setup()
    s.events.on_batch(batch(1, stored(1)))
    s.events.on_batch(batch(3, stored(3)))
    s.events.on_batch(batch(4, stored(4)))
    assert not s.events.synchronised
    assert s.index.overlap([1]).blocks == {"w0": 1}
    assert s.counters.gaps == 1
    s.events.on_snapshot(2, [2])
    assert s.events.synchronised
    assert s.index.overlap([2, 3, 4]).blocks == {"w0": 3}
    assert s.index.overlap([1]).blocks == {}


def test_a_late_batch_closes_the_gap_without_a_snapshot() -> None:
    s = Setup()
    s.events.on_batch(batch(1, stored(1)))
    s.events.on_batch(batch(3, BlocksRemoved([2])))
    s.events.on_batch(batch(2, stored(2)))
    assert s.events.synchronised
    assert s.num_blocks == 1


def test_duplicates_are_ignored_and_counted() -> None:
    s = Setup()
    s.events.on_batch(batch(1, stored(1)))
    s.events.on_batch(batch(2, BlocksRemoved([1])))
    s.events.on_batch(batch(1, stored(1)))
    s.events.on_batch(batch(5, stored(5)))
    s.events.on_batch(batch(5, stored(5)))
    assert s.counters.duplicates == 2
    assert s.num_blocks == 0


def test_repeating_the_latest_batch_is_no_gap() -> None:
    s = Setup()
    s.events.on_batch(batch(1, stored(1)))
    s.events.on_batch(batch(1, stored(1)))
    assert s.events.synchronised
    assert (s.counters.duplicates, s.counters.gaps) == (1, 0)


def test_a_snapshot_that_leaves_a_gap_is_not_enough() -> None:
    s = Setup()
    s.events.on_batch(batch(9, stored(9)))
    s.events.on_snapshot(5, [1])
    assert not s.events.synchronised
    s.events.on_snapshot(8, [1, 8])
    assert s.events.synchronised
    assert s.num_blocks == 3


def test_a_snapshot_older_than_the_index_is_ignored() -> None:
    s = Setup()
    s.events.on_snapshot(5, [1])
    s.events.on_batch(batch(6, stored(6)))
    s.events.distrust()
    s.events.on_snapshot(5, [1])
    assert s.num_blocks == 2
    assert not s.events.synchronised


def test_an_idle_instance_is_synchronised_by_an_empty_snapshot() -> None:
    s = Setup()
    s.events.on_snapshot(0, [])
    assert s.events.synchronised
    s.events.on_batch(batch(1, stored(1)))
    assert s.events.synchronised


def test_after_distrust_the_next_number_in_line_proves_that_nothing_was_lost() -> None:
    s = Setup()
    s.events.on_batch(batch(1, stored(1)))
    s.events.distrust()
    assert not s.events.synchronised
    s.events.on_batch(batch(2, stored(2)))
    assert s.events.synchronised


def test_the_buffer_is_bounded_and_its_oldest_batches_go_first() -> None:
    s = Setup(max_buffered_blocks=100)
    for seq in range(2, 202):
        s.events.on_batch(batch(seq, stored(*range(seq * 10, seq * 10 + 9))))
    assert s.counters.dropped == 190
    s.events.on_snapshot(150, [])
    assert not s.events.synchronised
    s.events.on_snapshot(191, [])
    assert s.events.synchronised
    assert s.num_blocks == 10 * 9


def test_any_loss_repetition_and_disorder_converges_to_the_truth() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        s, truth, seq, delayed = Setup(), set(), 0, []
        for _ in range(300):
            seq += 1
            if rng.random() < 0.7 or not truth:
                blocks = {rng.randrange(500) for _ in range(rng.randint(0, 5))}
                truth |= blocks
                sent = batch(seq, stored(*blocks))
            else:
                blocks = set(rng.sample(sorted(truth), rng.randint(1, len(truth))))
                truth -= blocks
                sent = batch(seq, BlocksRemoved(list(blocks)))
            fate = rng.random()
            if fate < 0.1:
                delayed.append(sent)
            elif fate > 0.15:
                s.events.on_batch(sent)
                if fate > 0.95:
                    s.events.on_batch(sent)
            if delayed and rng.random() < 0.1:
                s.events.on_batch(delayed.pop(rng.randrange(len(delayed))))
            if not s.events.synchronised and rng.random() < 0.2:
                s.events.on_snapshot(seq, sorted(truth))
            if s.events.synchronised and s.events.last_seq == seq:
                assert s.index.blocks("w0") == truth
        s.events.on_snapshot(seq, sorted(truth))
        assert s.events.synchronised
        assert s.index.blocks("w0") == truth
