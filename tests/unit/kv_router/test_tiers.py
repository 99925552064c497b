"""The index knows a block for as long as either of an instance's tiers holds it."""

import random

import pytest
from serving.kv_router.prefix_index import PrefixIndex
from serving.kv_router.tiers import InstanceTiers
from serving.protocol import BlocksCleared, BlocksRemoved, BlocksStored, Tier


class Setup:
    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.tiers = InstanceTiers(self.index, "w0")

    def store(self, *hashes: int, tier: Tier = "device") -> None:
        self.tiers.apply(BlocksStored(None, list(hashes), tier))

    def remove(self, *hashes: int, tier: Tier = "device") -> None:
        self.tiers.apply(BlocksRemoved(list(hashes), tier))

    def known(self) -> set[int]:
        return {h for h in range(100) if self.index.overlap([h])}


@pytest.fixture
def s() -> Setup:
    setup = Setup()
    setup.store(1, 2, 3)
    setup.store(2, 3, tier="host")
    return setup


def test_removal_from_one_tier_leaves_what_the_other_holds(s: Setup) -> None:
    s.remove(1, 2, 3)
    assert s.known() == {2, 3}
    s.remove(3, tier="host")
    assert s.known() == {2}
    s.store(2)
    s.remove(2, tier="host")
    assert s.known() == {2}
    s.remove(2)
    assert s.known() == set()


def test_removal_from_the_host_first(s: Setup) -> None:
    s.remove(2, 3, tier="host")
    assert s.known() == {1, 2, 3}
    s.remove(2, 3)
    assert s.known() == {1}


def test_cleared_means_both_tiers(s: Setup) -> None:
    s.tiers.apply(BlocksCleared())
    s.store(2)
    s.remove(2)
    assert s.known() == set()


def test_a_snapshot_tells_the_tiers_apart(s: Setup) -> None:
    s.tiers.replace([4, 5], [5, 6])
    assert s.known() == {4, 5, 6}
    s.remove(4, 5)
    assert s.known() == {5, 6}
    s.remove(5, 6, tier="host")
    assert s.known() == set()


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_moves_keeps_the_union(seed: int) -> None:
    rng = random.Random(seed)
    s, device, host = Setup(), set[int](), set[int]()
    for _ in range(500):
        some = {rng.randrange(40) for _ in range(rng.randint(1, 6))}
        match rng.randrange(5):
            case 0 | 1:
                s.store(*some)
                device |= some
            case 2:
                s.store(*some & device, tier="host")
                host |= some & device
            case 3:
                s.remove(*some)
                device -= some
            case _:
                s.remove(*some, tier="host")
                host -= some
        if rng.random() < 0.02:
            s.tiers.replace(sorted(device), sorted(host))
        assert s.known() == device | host
