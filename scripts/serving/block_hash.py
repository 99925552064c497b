"""Token ids to chained block hashes: equal in every process and on every machine.

    block_hash[i] = xxh3_64(little-endian u32 tokens of block i, seed = block_hash[i-1])

Each hash is the seed of the next. The first seed is made of a salt (model, revision, adapter), so
equal tokens of different models have different hashes. Only full blocks have a hash.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest


def root_hash(salt: str) -> int:
    """The parent of every first block of the model that `salt` names."""
    return xxh3_64_intdigest(salt.encode())


def chain(tokens: Sequence[int] | np.ndarray, block_size: int, parent: int) -> list[int]:
    """Hashes of the full blocks of `tokens`, following `parent` (from `root_hash` or a block).

    Raises OverflowError when a sequence holds an id outside 0 .. 2**32 - 1.
    """
    num_blocks = len(tokens) // block_size
    if not num_blocks:
        return []
    if isinstance(tokens, np.ndarray):
        ids: array[int] | np.ndarray = np.ascontiguousarray(tokens, dtype="<u4")
    else:
        ids = array("I", tokens)  # three times faster than numpy
        if sys.byteorder == "big":
            ids.byteswap()
    # Numpy cuts faster than slices do, and copies nothing else.
    blocks = np.frombuffer(ids, dtype=f"V{4 * block_size}", count=num_blocks)
    return [parent := xxh3_64_intdigest(block, parent) for block in blocks.tolist()]
