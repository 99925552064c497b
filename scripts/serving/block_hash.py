"""Token ids to chained block hashes: equal in every process and on every machine.

    block_hash[i] = xxh3_64(little-endian u64 block_hash[i-1] ++ little-endian u32 tokens of block i)

The chain starts from a root made of the salt (model, revision, adapter), so that equal tokens of
different models never meet. Only full blocks have a hash.
"""

from __future__ import annotations

import struct
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
    block_bytes = 4 * block_size
    full = tokens[: len(tokens) // block_size * block_size]
    # array() reads a list three times faster than numpy does, and numpy cuts it up faster.
    ids = np.asarray(full if isinstance(full, np.ndarray) else array("I", full), dtype="<u4")
    blocks: list[bytes] = np.frombuffer(ids.tobytes(), dtype=f"V{block_bytes}").tolist()
    join = struct.Struct(f"<Q{block_bytes}s").pack
    return [parent := xxh3_64_intdigest(join(parent, block)) for block in blocks]
