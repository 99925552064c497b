"""Groups of GPUs that are joined by NVLink.

Tensor parallelism exchanges activations in every layer, so a worker's GPUs should all be joined.
`serving.gpus` asks the driver which pairs are.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.gpus import Links


def all_joined(gpus: Sequence[int], links: Links) -> bool:
    """Whether NVLink joins every two of `gpus`."""
    return all(frozenset((a, b)) in links for i, a in enumerate(gpus) for b in gpus[:i])


def islands(gpus: Sequence[int], links: Links) -> list[list[int]]:
    """`gpus` in groups whose members are all joined, in the given order."""
    groups: list[list[int]] = []
    for gpu in gpus:
        home = next((group for group in groups if all_joined([*group, gpu], links)), None)
        if home is None:
            groups.append([gpu])
        else:
            home.append(gpu)
    return groups
