"""TensorRT-LLM's events in its exact JSON, against an index that believes ours."""

from __future__ import annotations

import json
from typing import Any

from serving import block_hash
from serving.engine.trtllm.reports.kv_events import KvEventTranslator
from serving.protocol import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

BLOCK = 4
ROOT = block_hash.root_hash("salt")
TOKENS = list(range(100, 140))
CHAIN = block_hash.chain(TOKENS, BLOCK, ROOT)
BIG = 2**64 - 10  # engine hashes are unsigned 64-bit


class Index:
    """A router's view, with the rule that a block's parent is there before it."""

    def __init__(self, block_size: int = BLOCK) -> None:
        self.translator = KvEventTranslator(block_size, "salt")
        self.held: set[int] = set()
        self.events: list[KvEvent] = []
        self._ids: dict[int, int] = {}

    def feed(
        self,
        data: dict[str, Any],
        *,
        skip: int = 0,
        rank: int | None = None,
        window: int | None = 1024,
        event_id: int | None = None,
    ) -> list[KvEvent]:
        key = rank or 0
        if event_id is None:
            event_id = self._ids.get(key, -1) + 1 + skip
            self._ids[key] = event_id
        event: dict[str, Any] = {"event_id": event_id, "data": data}
        if window is not None:
            event["window_size"] = window
        if rank is not None:
            event["attention_dp_rank"] = rank
        told = self.translator.feed(json.loads(json.dumps(event)))
        for each in told:
            if isinstance(each, BlocksStored):
                assert each.parent_hash is None or each.parent_hash in self.held
                assert not self.held & set(each.block_hashes), "told twice"
                self.held.update(each.block_hashes)
            elif isinstance(each, BlocksRemoved):
                assert self.held >= set(each.block_hashes), "never told"
                self.held.difference_update(each.block_hashes)
            else:
                self.held.clear()
        assert self.held == set(self.translator.present())
        self.events += told
        return told


def created(*levels: int) -> dict[str, Any]:
    return {"type": "created", "num_blocks_per_cache_level": list(levels)}


def stored(
    first: int, last: int, *, partial: int = 0, extra: int = 0, hashes: int = BIG, level: int = 0
) -> dict[str, Any]:
    """Blocks `first..last` of TOKENS; engine hash of block n is `hashes - n`."""
    blocks = []
    for n in range(first, last):
        tokens = TOKENS[n * BLOCK : (n + 1) * BLOCK]
        if partial and n == last - 1:
            tokens = tokens[:partial]
        blocks.append(
            {
                "type": "stored_block",
                "block_hash": hashes - n,
                "tokens": [
                    {"type": "unique_token", "token_id": t, "token_extra_id": extra} for t in tokens
                ],
                "cache_level": level,
                "priority": 35,
            }
        )
    parent = None if first == 0 else hashes - first + 1
    return {"type": "stored", "parent_hash": parent, "blocks": blocks}


def removed(*places: int, hashes: int = BIG) -> dict[str, Any]:
    return {"type": "removed", "block_hashes": [hashes - n for n in places]}


def test_hashes_are_ours_chained_over_events() -> None:
    index = Index()
    assert index.feed(created(64, 8)) == []
    assert index.feed(stored(0, 2)) == [BlocksStored(None, CHAIN[:2])]
    assert index.feed(stored(2, 4)) == [BlocksStored(CHAIN[1], CHAIN[2:4])]
    assert index.translator.num_blocks_by_level == [64, 8]


def test_removed_blocks_are_named_by_our_hashes() -> None:
    index = Index()
    index.feed(stored(0, 3))
    assert index.feed(removed(2, 1)) == [BlocksRemoved([CHAIN[2], CHAIN[1]])]
    assert index.held == {CHAIN[0]}


def test_block_can_come_back() -> None:
    index = Index()
    index.feed(stored(0, 2))
    index.feed(removed(1))
    assert index.feed(stored(1, 2)) == [BlocksStored(CHAIN[0], [CHAIN[1]])]


def test_partial_block_ends_an_event_and_its_removal_is_silent() -> None:
    index = Index()
    assert index.feed(stored(0, 3, partial=2)) == [BlocksStored(None, CHAIN[:2])]
    assert index.feed(removed(2)) == []
    assert index.feed(stored(0, 1, partial=1, hashes=500)) == []
    assert index.feed(removed(0, hashes=500)) == []
    assert index.held == set(CHAIN[:2])


def test_children_of_a_partial_block_are_dropped_and_counted() -> None:
    index = Index()
    index.feed(stored(0, 2, partial=2))
    assert index.feed(stored(2, 4)) == []
    assert index.translator.num_orphans == 2


def test_blocks_with_more_than_tokens_in_them_are_not_ours() -> None:
    index = Index()
    assert index.feed(stored(0, 2, extra=77)) == []


def test_unknown_parent_is_dropped_and_counted() -> None:
    index = Index()
    assert index.feed(stored(3, 5)) == []
    assert index.translator.num_orphans == 2
    assert index.feed(removed(3)) == []


def test_duplicates_and_empty_events_change_nothing() -> None:
    index = Index()
    index.feed(stored(0, 2))
    assert index.feed(stored(0, 2)) == []
    assert index.feed({"type": "stored", "parent_hash": None, "blocks": []}) == []
    assert index.feed(removed(0), event_id=0) == []  # told before
    assert index.held == set(CHAIN[:2])


def test_event_that_repeats_known_blocks_stores_only_the_new_ones() -> None:
    index = Index()
    index.feed(stored(0, 2))
    assert index.feed(stored(0, 4)) == [BlocksStored(CHAIN[1], CHAIN[2:4])]


def test_two_engine_blocks_with_equal_content_count_once() -> None:
    index = Index()
    index.feed(stored(0, 1))
    assert index.feed(stored(0, 1, hashes=500)) == []
    assert index.feed(removed(0)) == []
    assert index.feed(removed(0, hashes=500)) == [BlocksRemoved([CHAIN[0]])]


def test_signed_hashes_mean_the_same_blocks() -> None:
    index = Index()
    index.feed(stored(0, 2))
    signed = BIG - 2**64
    assert index.feed(removed(1, hashes=signed)) == [BlocksRemoved([CHAIN[1]])]


def test_offload_keeps_a_block_and_losing_it_on_the_host_removes_it() -> None:
    index = Index()
    index.feed(stored(0, 1))
    moved = {"type": "event_diff", "old_value": 0, "new_value": 1}
    updated = {"type": "updated", "block_hash": BIG, "cache_level": moved, "priority": None}
    assert index.feed(updated) == []
    assert index.held == {CHAIN[0]}
    assert index.feed(removed(0)) == [BlocksRemoved([CHAIN[0]])]


def test_only_the_largest_window_counts() -> None:
    index = Index()
    index.feed(created(16), window=128)
    index.feed(created(64), window=1024)
    assert index.translator.num_blocks_by_level == [64]
    assert index.feed(stored(0, 2), window=128) == []
    assert index.feed(stored(0, 2), window=1024) == [BlocksStored(None, CHAIN[:2])]
    assert index.feed(removed(0), window=128) == []
    index.feed(created(8), window=64)
    assert index.translator.num_blocks_by_level == [64]


def test_window_that_turns_out_larger_starts_afresh() -> None:
    index = Index()
    index.feed(stored(0, 2), window=128)
    told = index.feed(stored(0, 1), window=1024)
    assert told == [BlocksCleared(), BlocksStored(None, CHAIN[:1])]


def test_versions_without_windows_work() -> None:
    index = Index()
    assert index.feed(stored(0, 1), window=None) == [BlocksStored(None, CHAIN[:1])]


def test_gap_in_the_events_removes_all_blocks() -> None:
    index = Index()
    index.feed(stored(0, 3))
    assert index.feed(removed(9), skip=4) == [BlocksCleared()]
    assert index.translator.num_gaps == 1
    assert index.held == set()


def test_after_a_gap_a_stored_child_restores_its_parents() -> None:
    index = Index()
    index.feed(stored(0, 3))
    told = index.feed(stored(2, 4), skip=1)
    assert told == [
        BlocksCleared(),
        BlocksStored(None, CHAIN[:1]),
        BlocksStored(CHAIN[0], [CHAIN[1]]),
        BlocksStored(CHAIN[1], CHAIN[2:4]),
    ]
    assert index.feed(removed(3)) == [BlocksRemoved([CHAIN[3]])]


def test_removed_block_is_no_parent_after_a_gap() -> None:
    index = Index()
    index.feed(stored(0, 3))
    index.feed(removed(2, 1), skip=1)
    assert index.feed(stored(2, 3)) == []
    assert index.translator.num_orphans == 1


def test_blocks_missing_across_two_gaps_are_forgotten() -> None:
    index = Index()
    index.feed(stored(0, 2))
    index.feed(removed(9), skip=1)
    index.feed(removed(9), skip=1)
    assert index.feed(stored(2, 3)) == []
    assert index.translator.num_gaps == 2


def test_ranks_have_sequences_of_their_own_and_share_the_index() -> None:
    index = Index()
    index.feed(stored(0, 2), rank=0)
    assert index.feed(stored(0, 1), rank=1) == []  # our hash is there already
    assert index.feed(stored(1, 3, hashes=BIG), rank=1) == [BlocksStored(CHAIN[1], [CHAIN[2]])]
    assert index.feed(removed(1), rank=0) == []
    assert index.feed(removed(2, 1), rank=1) == [BlocksRemoved([CHAIN[2], CHAIN[1]])]
    assert index.translator.num_gaps == 0


def test_gap_of_one_rank_keeps_what_another_holds() -> None:
    index = Index()
    index.feed(stored(0, 3), rank=0)
    index.feed(stored(0, 1), rank=1)
    told = index.feed(removed(9), rank=0, skip=3)
    assert len(told) == 1
    assert isinstance(told[0], BlocksRemoved)
    assert index.held == {CHAIN[0]}


def test_first_event_may_have_any_number() -> None:
    index = Index()
    assert index.feed(stored(0, 1), event_id=41) == [BlocksStored(None, CHAIN[:1])]
    assert index.translator.num_gaps == 0
