"""Which GPUs are joined by NVLink, as `nvidia-smi topo -m` draws it.

Tensor parallelism exchanges activations in every layer, so a worker's GPUs should all be joined.
The matrix has a row and a column for each GPU; `NV18` in a cell means 18 links between the two,
`PIX`, `PXB`, `PHB`, `NODE` and `SYS` mean ever longer ways over PCIe. GPUs are counted as the
driver does, whatever CUDA_VISIBLE_DEVICES says.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

Links = frozenset[frozenset[int]]
"""Pairs of GPU indices with NVLink between them."""

ASK_S = 20.0
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # the header is underlined even when it goes into a pipe
_GPU = re.compile(r"GPU(\d+)$")


def observed_links() -> Links:
    """Ask the driver. Without `nvidia-smi`, or when it refuses, no links are known."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return frozenset()
    try:
        done = subprocess.run(
            [smi, "topo", "-m"], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return parse_links(done.stdout)


def parse_links(matrix: str) -> Links:
    """The pairs that the text of `nvidia-smi topo -m` shows as NVLink.

    Rows and columns of network cards, and those about CPUs, are passed over. Text that is no such
    matrix gives no links.
    """
    lines = [_STYLE.sub("", line).split() for line in matrix.splitlines()]
    header = next((words for words in lines if words and _GPU.match(words[0])), [])
    columns = []
    for word in header:  # GPUs come first in the header, before network cards
        match = _GPU.match(word)
        if match is None:
            break
        columns.append(int(match.group(1)))
    links = set()
    for words in lines:
        row = _GPU.match(words[0]) if words and words != header else None
        if row is None:
            continue
        for column, cell in zip(columns, words[1:], strict=False):
            if re.fullmatch(r"NV\d+", cell):
                links.add(frozenset((int(row.group(1)), column)))
    return frozenset(links)


def joined(gpus: Sequence[int], links: Links) -> bool:
    """Whether each of `gpus` has NVLink to each other one."""
    return all(frozenset((a, b)) in links for i, a in enumerate(gpus) for b in gpus[:i])


def islands(gpus: Sequence[int], links: Links) -> list[list[int]]:
    """`gpus` in groups that are joined throughout, both in the given order."""
    groups: list[list[int]] = []
    for gpu in gpus:
        home = next((group for group in groups if joined([*group, gpu], links)), None)
        if home is None:
            groups.append([gpu])
        else:
            home.append(gpu)
    return groups
