"""Shape, dtype and size of a KV block on the wire, on which both ends of a transfer must agree.

On the wire a run of blocks is C-contiguous
`[num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]`,
or with 1 for 2 where values are a part of keys (latent attention, whose one "head" is the latent),
whatever the engine's pool looks like inside.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from msgspec import Struct

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

WEIGHT_ONLY_DTYPES = ("int8",)
"""Values of `engine.dtype` that apply to stored weights only; computation and KV use float32."""


def kv_dtype(weights: str) -> str:
    """The dtype of KV and activations for an `engine.dtype`."""
    return "float32" if weights in WEIGHT_ONLY_DTYPES else weights


class KvLayout(Struct, frozen=True):
    """Everything that decides the bytes of a block; `dtype` is torch's name.

    `num_planes` 2: keys and values; 1: keys, of which values are a part.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    num_planes: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        num_vectors = self.num_layers * self.num_planes * self.num_kv_heads
        return num_vectors * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, self.num_planes, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def fingerprint(self) -> str:
        """Equal exactly when blocks can be exchanged."""
        return _fingerprint(self)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` occupy. The last block may be partly empty."""
        return -(-num_tokens // self.block_size)


@functools.lru_cache(maxsize=64)
def _fingerprint(layout: KvLayout) -> str:
    text = f"{layout.block_shape}{layout.dtype}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PoolMemory(NamedTuple):
    """An engine's blocks on a GPU: block `i` lies at `address + i * block_bytes`, in wire order."""

    address: int
    num_bytes: int


@dataclass(frozen=True)
class BlocksInPlace:
    """Blocks `block_ids` of another worker's pool, which is mapped at `address`.

    A sink gets this instead of a buffer that holds the blocks in a row. `owner` keeps the mapping.
    """

    address: int
    block_ids: Any  # int32 numpy array
    nbytes: int
    owner: object
