"""Grouping GPUs by NVLink."""

from __future__ import annotations

from serving.deploy.planning.nvlink import all_joined, islands
from unit.deploy.planning.nvlink_machines import HGX_8X, PAIRS_2X2, pairs


def test_islands_are_fully_joined_and_keep_the_order() -> None:
    assert islands([0, 1, 2, 3], PAIRS_2X2) == [[0, 2], [1, 3]]
    assert islands([3, 2, 1], PAIRS_2X2) == [[3, 1], [2]]
    assert islands([0, 1], frozenset()) == [[0], [1]]
    assert islands(range(8), HGX_8X) == [list(range(8))]


def test_a_chain_of_gpus_is_not_an_island() -> None:
    chain = pairs((0, 1), (1, 2))
    assert all_joined([0, 1], chain)
    assert not all_joined([0, 1, 2], chain)
    assert islands([0, 1, 2], chain) == [[0, 1], [2]]
