"""The prefix index answers as a table of sets would, and cleans up after instances."""

import random

import pytest
from serving.kv_router.prefix_index import PrefixIndex


def naive_overlap(held: dict[str, set[int]], hashes: list[int]) -> dict[str, int]:
    found = {}
    for instance, blocks in held.items():
        leading = 0
        while leading < len(hashes) and hashes[leading] in blocks:
            leading += 1
        if leading:
            found[instance] = leading
    return found


def make_chains(rng: random.Random, num_chains: int) -> list[list[int]]:
    """Chains that share prefixes of earlier ones, as conversations do."""
    chains: list[list[int]] = []
    for _ in range(num_chains):
        prefix = rng.choice(chains) if chains and rng.random() < 0.7 else []
        prefix = prefix[: rng.randint(0, len(prefix))]
        chains.append([*prefix, *(rng.getrandbits(64) for _ in range(rng.randint(1, 40)))])
    return chains


@pytest.mark.parametrize("seed", range(8))
def test_overlap_equals_a_naive_model_under_leaf_first_eviction(seed: int) -> None:
    rng = random.Random(seed)
    chains = make_chains(rng, 30)
    index, held = PrefixIndex(), {}
    for _ in range(600):
        instance = f"w{rng.randrange(70)}"
        chain = rng.choice(chains)
        kept = rng.randint(0, len(chain))
        action = rng.random()
        if action < 0.6:
            index.store(instance, chain[:kept])
            held.setdefault(instance, set()).update(chain[:kept])
        elif action < 0.9:
            # Everything that descends from the cut leaves with it: no inner block goes alone.
            gone = {h for c in chains for i, h in enumerate(c) if set(c[: i + 1]) & {*chain[kept:]}}
            index.remove(instance, list(gone))
            held.setdefault(instance, set()).difference_update(gone)
        elif action < 0.94:
            index.clear(instance)
            held[instance] = set()
        elif action < 0.97:
            index.replace(instance, chain[:kept])
            held[instance] = set(chain[:kept])
        else:
            index.remove_instance(instance)
            held.pop(instance, None)
        query = [*rng.choice(chains), *(rng.getrandbits(64) for _ in range(rng.randrange(3)))]
        assert index.overlap(query) == naive_overlap(held, query)
    assert {name: index.num_blocks(name) for name in held} == {n: len(b) for n, b in held.items()}
    assert len(index) == len(set().union(*held.values()))


@pytest.mark.parametrize("seed", range(8))
def test_with_inner_blocks_missing_an_answer_still_ends_where_a_held_run_ends(seed: int) -> None:
    rng = random.Random(seed)
    hashes = [rng.getrandbits(64) for _ in range(50)]
    index, held = PrefixIndex(), {}
    for instance in ("a", "b", "c"):
        held[instance] = set(rng.sample(hashes, 35)) | {hashes[0]}
        index.store(instance, list(held[instance]))
    found = index.overlap(hashes)
    truth = naive_overlap(held, hashes)
    assert found.keys() == truth.keys()
    for instance, leading in found.items():
        assert leading >= truth[instance]
        assert hashes[leading - 1] in held[instance]
        assert leading == len(hashes) or hashes[leading] not in held[instance]


def test_an_instance_without_the_first_block_has_no_overlap() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2, 3, 4])
    index.remove("a", [1])
    assert index.overlap([1, 2, 3, 4]) == {}


def test_a_filled_hole_makes_the_answer_exact_again() -> None:
    index = PrefixIndex()
    index.store("a", list(range(1, 9)))
    index.remove("a", [2])
    assert index.overlap([1, 2, 3]) in ({"a": 1}, {"a": 3})
    index.store("a", [2])
    assert index.overlap([1, 2, 3, 99]) == {"a": 3}


def test_many_instances_with_different_depths_are_all_found() -> None:
    index = PrefixIndex()
    hashes = list(range(1000, 1300))
    depths = {f"w{i}": 1 + (i * 37) % 300 for i in range(200)}
    for instance, depth in depths.items():
        index.store(instance, hashes[:depth])
    assert index.overlap(hashes) == depths


def test_an_empty_prompt_and_an_empty_index_overlap_nowhere() -> None:
    index = PrefixIndex()
    assert index.overlap([]) == {}
    assert index.overlap([1, 2]) == {}


def test_removing_what_was_never_held_changes_nothing() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2])
    index.remove("a", [7])
    index.remove("stranger", [1])
    index.clear("stranger")
    index.remove_instance("stranger")
    assert index.overlap([1, 2]) == {"a": 2}


def test_a_removed_instance_leaves_nothing_behind_for_its_successor() -> None:
    index = PrefixIndex()
    index.store("old", [1, 2, 3])
    index.store("other", [1])
    index.remove_instance("old")
    assert len(index) == 1
    index.store("new", [9])
    assert index.overlap([1, 2, 3]) == {"other": 1}
    assert index.overlap([9]) == {"new": 1}


def test_masks_stay_small_however_many_instances_come_and_go() -> None:
    index = PrefixIndex()
    for generation in range(500):
        index.store(f"w{generation}", [1])
        index.remove_instance(f"w{generation - 1}")
    assert max(index._holders.values()) <= 0b11


def test_replacing_keeps_what_is_in_both() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2, 3])
    index.replace("a", [1, 2, 8])
    assert index.overlap([1, 2, 3]) == {"a": 2}
    assert index.overlap([1, 2, 8]) == {"a": 3}
    assert index.num_blocks("a") == 3
