"""Which GPUs are joined by NVLink, on machines of several kinds."""

from __future__ import annotations

import itertools

from serving.gpus import Links


def pairs(*groups: tuple[int, ...]) -> Links:
    """Every pair within each group."""
    return frozenset(
        frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)
    )


HGX_8X: Links = pairs(tuple(range(8)))
PCIE_4X: Links = frozenset()
PAIRS_2X2: Links = pairs((0, 2), (1, 3))
