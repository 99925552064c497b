"""The host inputs of a step on CUDA, in one copy.

Every index of a step is packed into one int32 vector in pinned memory, copied without waiting, and
sliced on the device. Block tables stay on the device; a step brings only the entries that changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import numpy as np
import torch

from serving.engine.core.sequence import Sequence, State
from serving.engine.core.step import Chunk

# A pinned buffer is written again this many steps later: by then its copy has long been made.
_ROTATION = 4
# Rows of the tables for sequences whose last step is still under way when others start.
_SPARE_SLOTS = 2


class Slots:
    """A row of the block tables (and of the last tokens) for each running sequence."""

    def __init__(self, max_batch_size: int, width: int) -> None:
        self.count = _SPARE_SLOTS * max_batch_size
        self.width = width
        self._owners: list[Sequence | None] = [None] * self.count
        self._free = list(range(self.count - 1, -1, -1))

    def assign(self, sequence: Sequence) -> int:
        """The sequence's slot, a new one if it has none."""
        if sequence.slot is not None and self._owners[sequence.slot] is sequence:
            return sequence.slot
        if not self._free:
            self._sweep()
        slot = self._free.pop()
        self._owners[slot] = sequence
        sequence.slot, sequence.num_tabled = slot, 0
        return slot

    def _sweep(self) -> None:
        for slot, owner in enumerate(self._owners):
            if owner is not None and owner.state is not State.RUNNING and not owner.in_flight:
                self._owners[slot] = None
                self._free.append(slot)
        assert self._free, "more sequences run than the batch size allows"

    def changes(self, sequences: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """(flat index, block number) of every table entry that is new since the last step."""
        indices: list[np.ndarray] = []
        blocks: list[int] = []
        for sequence in sequences:
            assert sequence.slot is not None
            first, last = sequence.num_tabled, len(sequence.blocks)
            if first < last:
                start = sequence.slot * self.width
                indices.append(np.arange(start + first, start + last, dtype=np.int32))
                blocks += sequence.blocks[first:]
                sequence.num_tabled = last
        if not indices:
            empty = np.empty(0, dtype=np.int32)
            return empty, empty
        return np.concatenate(indices), np.asarray(blocks, dtype=np.int32)


class Packer:
    """Copies vectors of int32 to the device together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: list[torch.Tensor] = [self._make(4096) for _ in range(_ROTATION)]
        self._turn = 0

    def pack(
        self, vectors: Rows[np.ndarray], target: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The vectors on the device, as slices of one tensor: of `target` where given."""
        sizes = [len(vector) for vector in vectors]
        total = sum(sizes)
        self._turn = (self._turn + 1) % _ROTATION
        if len(self._pinned[self._turn]) < total:
            self._pinned[self._turn] = self._make(2 * total)
        pinned = self._pinned[self._turn][:total]
        np.concatenate(vectors, out=pinned.numpy())
        if target is None:
            target = torch.empty(total, dtype=torch.int32, device=self._device)
        target = target[:total]
        target.copy_(pinned, non_blocking=True)
        return list(torch.split(target, sizes))

    def _make(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")


class PrefillSpan:
    """The vectors of one prefill chunk: token ids, positions, and pool rows of its tokens."""

    def __init__(self, chunk: Chunk, block_size: int) -> None:
        sequence: Sequence = chunk.sequence
        self._end = chunk.start + chunk.length
        self._block_size, self._blocks = block_size, sequence.blocks
        self.ids = np.asarray(sequence.tokens[chunk.start : self._end], dtype=np.int32)
        self.positions = np.arange(chunk.start, self._end, dtype=np.int32)
        self.rows = self._rows(chunk.start)

    def kv_rows(self) -> np.ndarray:
        """Where all tokens up to the end of the chunk are kept."""
        return self._rows(0)

    def _rows(self, start: int) -> np.ndarray:
        positions = np.arange(start, self._end, dtype=np.int32)
        blocks = np.asarray(self._blocks, dtype=np.int32)[positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size
