"""The prefix index answers as a table of sets would, whatever it is told, and stays in bounds."""

import random
import time

import pytest
from serving.kv_router.block_tree import BlockTree
from serving.kv_router.prefix_index import Overlap, PrefixIndex

TIERS = ("device", "host")


class Naive:
    """The same, as sets: slow and evidently right."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, set[int]]] = {}

    def of(self, instance: str) -> dict[str, set[int]]:
        return self.held.setdefault(instance, {"device": set(), "host": set()})

    def overlap(self, hashes: list[int]) -> Overlap:
        blocks, on_host = {}, {}
        for instance, tiers in self.held.items():
            leading = 0
            while leading < len(hashes) and hashes[leading] in tiers["device"] | tiers["host"]:
                leading += 1
            if leading:
                blocks[instance] = leading
            if only := sum(h not in tiers["device"] for h in hashes[:leading]):
                on_host[instance] = only
        return Overlap(blocks, on_host)


def make_chains(rng: random.Random, num_chains: int) -> list[list[int]]:
    """Chains that share prefixes of earlier ones, as conversations do."""
    chains: list[list[int]] = []
    for _ in range(num_chains):
        prefix = rng.choice(chains) if chains and rng.random() < 0.7 else []
        prefix = prefix[: rng.randint(0, len(prefix))]
        chains.append([*prefix, *(rng.getrandbits(64) for _ in range(rng.randint(1, 40)))])
    return chains


def descendants(chains: list[list[int]]) -> dict[int, set[int]]:
    """Each block with all that follow it anywhere: what leaves before it when leaves go first."""
    found: dict[int, set[int]] = {}
    for chain in chains:
        for place, block_hash in enumerate(chain):
            found.setdefault(block_hash, set()).update(chain[place:])
    return found


def check(index: PrefixIndex, naive: Naive) -> None:
    """What the index knows of each instance is what the instance holds, and adds up."""
    for instance, tiers in naive.held.items():
        for tier in TIERS:
            assert index.blocks(instance, tier) == tiers[tier]
        assert index.num_blocks(instance) == sum(map(len, tiers.values()))
    tree = index._tree
    for _ in range(len(tree._to_trim)):
        tree.tidy()
    runs = set(tree._by_use)
    assert set(tree.run_of.values()) == runs
    assert len(tree) == sum(len(run.hashes) for run in runs)
    for run in runs:
        assert len(run.hashes) == run.num_needed() <= index._tree._run_blocks
        assert run.parent is None or (run.parent in runs and run.parent.forks[run.at] > 0)
        assert 0 not in {*run.device.values(), *run.host.values()}
    assert sum(sum(run.forks.values()) for run in runs) == sum(
        run.parent is not None for run in runs
    )


@pytest.mark.parametrize("orderly", [True, False], ids=["leaf-first", "any-order"])
@pytest.mark.parametrize("run_blocks", [4, 512])
@pytest.mark.parametrize("seed", range(4))
def test_answers_equal_a_naive_model_at_every_step(
    seed: int, run_blocks: int, orderly: bool
) -> None:
    """With holes, unknown parents, parentless snapshots, two tiers and instances that vanish."""
    rng = random.Random(seed)
    chains = make_chains(rng, 30)
    after = descendants(chains)
    index, naive = PrefixIndex(tree=BlockTree(run_blocks, at_once=1)), Naive()
    for step in range(500):
        instance = f"w{rng.randrange(12)}"
        tier = "host" if rng.random() < 0.2 else "device"
        held = naive.of(instance)[tier]
        chain = rng.choice(chains)
        start = 0 if orderly else rng.randint(0, len(chain))
        end = rng.randint(start, len(chain))
        piece, parent = chain[start:end], chain[start - 1] if start else None
        action = rng.random()
        if action < 0.55:
            index.store(instance, piece, parent, tier)
            held.update(piece)
        elif action < 0.85:
            if orderly:
                gone = after[chain[end]] if end < len(chain) else set()
            else:
                gone = set(rng.sample(chain, min(len(chain), rng.randint(0, 5))))
            index.remove(instance, list(gone), tier)
            held -= gone
        elif action < 0.9:
            index.clear(instance)
            naive.held[instance] = {"device": set(), "host": set()}
        elif action < 0.95:
            both = {"device": {*piece}, "host": {*rng.sample(chain, min(3, len(chain)))}}
            index.replace(instance, both["device"], both["host"])
            naive.held[instance] = both
        else:
            index.remove_instance(instance)
            naive.held.pop(instance, None)
        query = [*rng.choice(chains), *(rng.getrandbits(64) for _ in range(rng.randrange(3)))]
        assert index.overlap(query) == naive.overlap(query)
        if step % 50 == 49:
            check(index, naive)
    check(index, naive)


def test_an_inner_block_that_was_evicted_ends_the_run_until_it_is_back() -> None:
    index = PrefixIndex()
    chain = list(range(1, 101))
    index.store("a", chain)
    index.store("b", chain[:60])
    index.remove("a", [31])
    assert index.overlap(chain).blocks == {"a": 30, "b": 60}
    index.store("a", [31], parent_hash=30)
    assert index.overlap(chain).blocks == {"a": 100, "b": 60}


def test_an_instance_without_the_first_block_has_no_overlap() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2, 3, 4])
    index.remove("a", [1])
    assert index.overlap([1, 2, 3, 4]).blocks == {}


def test_a_parentless_snapshot_is_placed_by_the_prompts_that_follow() -> None:
    index = PrefixIndex()
    chains = [[1, 2, 3, 4, 5], [1, 2, 13, 14]]
    index.replace("a", {1, 2, 3, 4, 13, 14})
    index.replace("b", {1, 2, 4})
    assert index.overlap(chains[0]).blocks == {"a": 4, "b": 2}
    assert index.overlap(chains[1]).blocks == {"a": 4, "b": 2}
    assert index.num_blocks("b") == 3
    index.store("b", [3], parent_hash=2)
    assert index.overlap(chains[0]).blocks == {"a": 4, "b": 4}
    assert index._num_loose == 0


def test_many_instances_with_different_depths_are_all_found() -> None:
    index = PrefixIndex()
    hashes = list(range(1000, 1300))
    depths = {f"w{i}": 1 + (i * 37) % 300 for i in range(200)}
    for instance, depth in depths.items():
        index.store(instance, hashes[:depth])
    assert index.overlap(hashes).blocks == depths


def test_a_block_in_both_tiers_counts_as_on_the_device() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2, 3, 4])
    index.store("a", [2, 3, 4, 5], parent_hash=1, tier="host")
    assert index.overlap([1, 2, 3, 4, 5, 6]) == ({"a": 5}, {"a": 1})
    index.remove("a", [4, 3])
    assert index.overlap([1, 2, 3, 4, 5, 6]) == ({"a": 5}, {"a": 3})
    index.remove("a", [3], tier="host")
    assert index.overlap([1, 2, 3, 4, 5, 6]) == ({"a": 2}, {})


def test_an_empty_prompt_and_an_empty_index_overlap_nowhere() -> None:
    index = PrefixIndex()
    assert index.overlap([]) == ({}, {})
    assert index.overlap([1, 2]) == ({}, {})
    index.store("a", [])
    assert index.overlap([1]) == ({}, {})


def test_removing_what_was_never_held_changes_nothing() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2])
    index.store("b", [1])
    index.remove("a", [7])
    index.remove("b", [2])
    index.remove("stranger", [1])
    index.clear("stranger")
    index.remove_instance("stranger")
    assert index.overlap([1, 2]).blocks == {"a": 2, "b": 1}


def test_a_removed_instance_leaves_nothing_behind_for_its_successor() -> None:
    index = PrefixIndex()
    index.store("old", [1, 2, 3])
    index.store("other", [1])
    index.remove_instance("old")
    assert len(index) == 1
    index.store("new", [9])
    assert index.overlap([1, 2, 3]).blocks == {"other": 1}
    assert index.overlap([9]).blocks == {"new": 1}


def test_replacing_keeps_what_is_in_both() -> None:
    index = PrefixIndex()
    index.store("a", [1, 2, 3])
    index.replace("a", [1, 2, 8])
    assert index.overlap([1, 2, 3]).blocks == {"a": 2}
    assert index.overlap([1, 2, 8]).blocks == {"a": 3}
    assert index.num_blocks("a") == 3


@pytest.mark.parametrize("seed", range(3))
def test_contradictory_events_do_not_corrupt_the_index(seed: int) -> None:
    """Hashes that repeat, contradict their parents or go in circles: answers may be odd, later
    ones of orderly instances are right, and everything can be removed again."""
    rng = random.Random(seed)
    index = PrefixIndex(max_blocks=60)
    for _ in range(3000):
        hashes = [rng.randrange(40) for _ in range(rng.randrange(6))]
        parent = rng.choice([None, rng.randrange(40)])
        action = rng.random()
        if action < 0.5:
            index.store(f"w{rng.randrange(3)}", hashes, parent, rng.choice(TIERS))
        elif action < 0.9:
            index.remove(f"w{rng.randrange(3)}", hashes, rng.choice(TIERS))
        else:
            index.replace(f"w{rng.randrange(3)}", hashes)
        index.overlap([rng.randrange(40) for _ in range(8)])
    for name in ("w0", "w1", "w2"):
        index.remove_instance(name)
    index.store("good", [101, 102, 103])
    assert index.overlap([101, 102, 104]).blocks == {"good": 2}


def test_a_full_index_evicts_the_least_recently_used_runs_leaves_first() -> None:
    index = PrefixIndex(max_blocks=100)
    system = list(range(10))
    index.store("a", system)
    index.store("b", system)
    turns = [[1000 * n + i for i in range(30)] for n in range(1, 4)]
    for turn in turns:
        index.store("a", turn, parent_hash=9)
    index.overlap([*system, *turns[0]])
    index.store("a", [5000 + i for i in range(30)], parent_hash=9)
    assert len(index) <= 100
    assert index.evicted == 30
    assert index.overlap([*system, *turns[0]]).blocks["a"] == 40
    assert index.overlap([*system, *turns[1]]).blocks["a"] == 10
    index.store("a", turns[1], parent_hash=9)  # it is stored again, and known again
    assert index.overlap([*system, *turns[1]]).blocks["a"] == 40


def test_loose_blocks_are_evicted_before_placed_ones() -> None:
    index = PrefixIndex(max_blocks=100)
    index.store("a", list(range(60)))
    index.replace("b", range(1000, 1200))
    assert len(index) <= 100
    assert index.overlap(list(range(60))).blocks == {"a": 60}


@pytest.mark.parametrize("seed", range(3))
def test_a_bounded_index_never_claims_what_is_not_held(seed: int) -> None:
    rng = random.Random(seed)
    chains = make_chains(rng, 60)
    after = descendants(chains)
    index, naive = PrefixIndex(max_blocks=200), Naive()
    for _ in range(600):
        instance, chain = f"w{rng.randrange(5)}", rng.choice(chains)
        cut = rng.randint(0, len(chain))
        held = naive.of(instance)["device"]
        if rng.random() < 0.7:
            new = [h for h in chain[:cut] if h not in held]  # engines do not tell twice
            if new:
                place = chain.index(new[0])
                index.store(instance, new, chain[place - 1] if place else None)
            held.update(new)
        else:
            gone = after[chain[cut]] if cut < len(chain) else set()
            index.remove(instance, list(gone))
            held -= gone
        assert len(index) <= 200
        query = rng.choice(chains)
        truth = naive.overlap(query).blocks
        for name, leading in index.overlap(query).blocks.items():
            assert leading <= truth[name]
    for name, tiers in naive.held.items():
        index.remove(name, list(tiers["device"]))
    assert len(index) == 0


def test_removing_an_instance_with_many_blocks_takes_little_time() -> None:
    """Blocks of its own go bit by bit, with the events of others."""
    index = PrefixIndex()
    rng = random.Random(1)
    for _ in range(300):
        index.store("lost", [rng.getrandbits(64) for _ in range(512)])
    started = time.perf_counter()
    index.remove_instance("lost")
    stalled_s = time.perf_counter() - started
    assert index.num_blocks("lost") == 0
    assert len(index) > 512 * 280
    started = time.perf_counter()
    for n in range(300):
        index.store("other", [n])
    assert len(index) == 300
    assert stalled_s < 0.5 * (time.perf_counter() - started)
