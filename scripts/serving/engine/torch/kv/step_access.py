"""One step's way into the pool: where its new tokens' KV goes, and which blocks its parts read.

Where all layers keep KV of one shape, a pool is rows of equal size, and one flat index reaches all
of them. Otherwise each layer has views of its own, with strides.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from serving.engine.torch.kv.pool import KvPool


class StepAccess(Protocol):
    """`index` counts the layers that keep KV, in the order in which they lie in a block."""

    def write(self, index: int, kept: list[torch.Tensor]) -> None:
        """Rounded keys, and values where they are kept, `[H, T, D]`, of the step's new tokens."""

    def add_part(self, table: np.ndarray, longest: int) -> None:
        """Sequences that read together: `table[B, W]` has the blocks of each, block 0 pads."""

    def read(self, index: int, part: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a part's sequences: `[B, H, longest, D]` each. Twice the same where
        values are a part of keys."""


def access_of(pool: KvPool, blocks: np.ndarray, offsets: np.ndarray) -> StepAccess:
    """`blocks` and `offsets` say where each of the step's new tokens goes."""
    kind = UniformAccess if pool.layout.is_uniform else GroupedAccess
    return kind(pool, blocks, offsets)


class UniformAccess:
    """See `StepAccess`. Block rows: keys of all blocks, then values."""

    def __init__(self, pool: KvPool, blocks: np.ndarray, offsets: np.ndarray) -> None:
        self._pool, self._device = pool, pool.tensor.device
        group = pool.layout.only_group
        self._shape = (group.num_planes, group.num_kv_heads, group.key_dim)
        self._num_layers, self._num_planes = group.num_layers, group.num_layers * group.num_planes
        size = pool.layout.block_size
        rows = blocks * (self._num_planes * size) + offsets
        table = (np.arange(self._num_planes) * size)[:, None] + rows[None, :]
        # [num_layers, planes, T]: rows of `token_rows`.
        shape = (self._num_layers, group.num_planes, -1)
        self._writes = torch.from_numpy(table).view(shape).to(self._device)
        self._parts: list[tuple[torch.Tensor, int, int]] = []

    def write(self, index: int, kept: list[torch.Tensor]) -> None:
        for each, at in zip(kept, self._writes[index], strict=True):
            self._pool.write_tokens(at, each.transpose(0, 1))

    def add_part(self, table: np.ndarray, longest: int) -> None:
        planes = np.arange(self._num_planes)
        rows = table.reshape(1, -1) * self._num_planes + planes[:, None]
        rows = rows.reshape(self._num_layers, -1)
        self._parts.append((torch.from_numpy(rows).to(self._device), len(table), longest))

    def read(self, index: int, part: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rows, num_sequences, longest = self._parts[part]
        num_planes, num_heads, dim = self._shape
        found = self._pool.read_blocks(rows[index], dtype)
        kv = found.view(num_planes, num_sequences, -1, num_heads, dim)
        kv = kv[:, :, :longest].transpose(2, 3)
        return kv[0], kv[-1]


class GroupedAccess:
    """See `StepAccess`."""

    def __init__(self, pool: KvPool, blocks: np.ndarray, offsets: np.ndarray) -> None:
        self._pool, self._device = pool, pool.tensor.device
        self._at = tuple(torch.from_numpy(each).to(self._device) for each in (blocks, offsets))
        self._parts: list[tuple[torch.Tensor, int]] = []

    def write(self, index: int, kept: list[torch.Tensor]) -> None:
        for view, each in zip(self._pool.layer_views[index], kept, strict=True):
            view.index_put_(self._at, each.transpose(0, 1).view(view.dtype))

    def add_part(self, table: np.ndarray, longest: int) -> None:
        self._parts.append((torch.from_numpy(table).to(self._device), longest))

    def read(self, index: int, part: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        table, longest = self._parts[part]
        found = []
        for view in self._pool.layer_views[index]:
            kept = view[table].view(self._pool.dtype).to(dtype)  # [B, W, size, H, D]
            found.append(kept.flatten(1, 2)[:, :longest].transpose(1, 2))
        return found[0], found[-1]
