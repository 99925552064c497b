"""Messages cut to size: nothing lost, nothing reordered, nothing over the limit."""

import asyncio
import random

import msgspec
import pytest
from serving.events.pieces import KvSnapshot, SnapshotParts, snapshot_parts, split_events
from serving.protocol import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    KvEvent,
    KvEventBatch,
    KvSnapshotPart,
    msgpack_encode,
)

LIMIT = 2048
WORST = 2**64 - 1


def applied(events: list[KvEvent]) -> list[tuple[str, int, int | str | None]]:
    """One entry a block and tier: what happens there, and its parent where it is stored."""
    effects: list[tuple[str, int, int | str | None]] = []
    for event in events:
        if isinstance(event, BlocksStored):
            parent = event.parent_hash
            for one in event.block_hashes:
                effects.append((f"stored {event.tier}", one, parent))
                parent = one
        elif isinstance(event, BlocksRemoved):
            effects += [(f"removed {event.tier}", one, None) for one in event.block_hashes]
        else:
            effects.append(("cleared", 0, None))
    return effects


def size(events: list[KvEvent]) -> int:
    return len(msgpack_encode(KvEventBatch("x" * 200, WORST, WORST, events)))


@pytest.mark.parametrize("seed", range(20))
def test_any_events_survive_splitting_within_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    events: list[KvEvent] = []
    for _ in range(rng.randrange(1, 60)):
        hashes = [WORST - rng.randrange(1000) for _ in range(rng.choice([0, 1, 5, 160, 500]))]
        parent, tier = rng.choice([None, WORST]), rng.choice(["device", "host"])
        kinds = [BlocksStored(parent, hashes, tier), BlocksRemoved(hashes, tier), BlocksCleared()]
        events.append(rng.choice(kinds))
    groups = split_events(events, LIMIT)
    assert all(size(group) <= LIMIT for group in groups)
    joined = [event for group in groups for event in group]
    assert applied(joined) == applied(events)


def test_small_step_stays_one_message() -> None:
    events: list[KvEvent] = [BlocksStored(None, [1, 2]), BlocksRemoved([3]), BlocksCleared()]
    assert split_events(events, LIMIT) == [events]
    assert split_events([], LIMIT) == []


@pytest.mark.parametrize("num_on_host", [0, 1, 300])
@pytest.mark.parametrize("num_hashes", [0, 1, 170, 171, 5000])
def test_snapshot_parts_fit_and_number_themselves(num_hashes: int, num_on_host: int) -> None:
    hashes = [WORST - i for i in range(num_hashes)]
    on_host = [WORST - i for i in range(num_on_host)]
    parts = snapshot_parts(KvSnapshot("x" * 200, WORST, WORST, hashes, on_host), LIMIT)
    assert all(len(msgpack_encode(part)) <= LIMIT for part in parts)
    assert [part.part for part in parts] == list(range(parts[0].num_parts))
    assert [one for part in parts for one in part.block_hashes] == hashes
    assert [one for part in parts for one in part.host_hashes] == on_host


async def test_snapshot_is_complete_in_any_order_of_its_parts() -> None:
    parts = snapshot_parts(KvSnapshot("a", 1, 9, list(range(1000)), list(range(500))), LIMIT)
    random.Random(1).shuffle(parts)
    answer = asyncio.get_running_loop().create_future()
    joined = SnapshotParts(answer)
    for part in parts[:-1]:
        joined.add(part)
        joined.add(part)  # delivered twice
        assert not answer.done()
    joined.add(parts[-1])
    assert (await answer).block_hashes == list(range(1000))
    assert (await answer).host_hashes == list(range(500))


async def test_snapshot_of_a_dead_epoch_does_not_mix_with_the_new_one() -> None:
    answer = asyncio.get_running_loop().create_future()
    joined = SnapshotParts(answer)
    old = KvSnapshotPart("a", 1, 50, 0, 2, [1])
    joined.add(old)
    joined.add(KvSnapshotPart("a", 2, 3, 1, 2, [20]))
    joined.add(msgspec.structs.replace(old, part=1))
    assert not answer.done()
    joined.add(KvSnapshotPart("a", 2, 3, 0, 2, [10]))
    snapshot = await answer
    assert (snapshot.epoch, snapshot.seq, snapshot.block_hashes) == (2, 3, [10, 20])
