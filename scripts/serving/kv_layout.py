"""Shape, dtype and size of a KV block on the wire, on which both ends of a transfer must agree.

A block is one contiguous run of bytes: group after group, in a group layer after layer, of each
layer keys `[block_size, num_kv_heads, key_dim]` and then values `[block_size, num_kv_heads,
value_dim]`. This is also how it lies in the engine's pool. Which layer of a model keeps its KV in
which row of a group, and which layers read the KV of others, is the engine's business.
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


class KvGroup(Struct, frozen=True):
    """Layers whose KV has one shape. `value_dim` is 0 where values are a part of the keys (latent
    attention, whose one "head" is the latent)."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def token_width(self) -> int:
        """Numbers that are kept of one token over the layers of the group."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)

    @property
    def num_planes(self) -> int:
        """2: keys and values; 1: keys, of which values are a part."""
        return 2 if self.value_dim else 1


class KvLayout(Struct, frozen=True):
    """Everything that decides the bytes of a block; `dtype` is torch's name."""

    groups: tuple[KvGroup, ...]
    block_size: int
    dtype: str

    @staticmethod
    def uniform(
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: str,
        num_planes: int = 2,
    ) -> KvLayout:
        """All layers keep KV of one shape. `num_planes` 1: values are a part of the keys."""
        value_dim = head_dim if num_planes == 2 else 0
        return KvLayout(
            (KvGroup(num_layers, num_kv_heads, head_dim, value_dim),), block_size, dtype
        )

    @property
    def is_uniform(self) -> bool:
        """Whether a block is one array of equal vectors, `block_shape`."""
        return len(self.groups) == 1 and self.groups[0].value_dim in (0, self.groups[0].key_dim)

    @property
    def only_group(self) -> KvGroup:
        """Of a uniform layout."""
        assert self.is_uniform, "layers keep KV of several shapes"
        return self.groups[0]

    @property
    def num_layers(self) -> int:
        """Layers that keep KV of their own."""
        return sum(group.num_layers for group in self.groups)

    @property
    def num_planes(self) -> int:
        return self.only_group.num_planes

    @property
    def num_kv_heads(self) -> int:
        return self.only_group.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.only_group.key_dim

    @property
    def token_width(self) -> int:
        """Numbers that are kept of one token."""
        return sum(group.token_width for group in self.groups)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers."""
        return self.token_width * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of a uniform layout."""
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
    text = repr(layout)
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
