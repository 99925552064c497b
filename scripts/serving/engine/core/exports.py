"""Finished prefills whose blocks wait for a decode worker, and blocks that transfers are reading."""

from __future__ import annotations

from serving.engine.core.sequence import Sequence, State
from serving.engine.core.sequence_blocks import SequenceBlocks


class Exports:
    """Holds the blocks of finished prefills until they are released. Not thread-safe."""

    def __init__(self, blocks: SequenceBlocks) -> None:
        self._blocks = blocks
        self.finished: dict[str, Sequence] = {}  # request id -> a prefill in state EXPORTED
        self.lent: list[list[int]] = []  # blocks that copies under way read

    def hold(self, sequence: Sequence) -> None:
        """A prefill has ended with a result: keep its blocks."""
        sequence.state = State.EXPORTED
        self.finished[sequence.request_id] = sequence

    def release(self, request_id: str) -> None:
        """Free the blocks of a finished prefill. Unknown ids are ignored."""
        sequence = self.finished.pop(request_id, None)
        if sequence is not None:
            sequence.state = State.DONE
            self._blocks.free(sequence)

    def num_readable(self, sequence: Sequence | None) -> int:
        """Leading blocks whose KV is complete: full blocks of a running prefill, all blocks of a
        finished one, 0 for any other request."""
        if sequence is None:
            return 0
        if sequence.state is State.EXPORTED:
            return len(sequence.blocks)
        if sequence.request.phase != "prefill" or sequence.state is not State.RUNNING:
            return 0
        num_full = sequence.num_readable // self._blocks.block_size
        return self._blocks.pool.num_arrived(sequence.blocks[:num_full])

    def lend(self, sequence: Sequence, first: int, count: int) -> list[int]:
        """Blocks `first .. first + count` of a prefill, held until `take_back` in any case.

        Raises KeyError when they are not computed (any more), ValueError when they never will be.
        """
        if first < 0 or 0 < len(sequence.blocks) < first + count:
            raise ValueError(
                f"{count} blocks from block {first} do not match {len(sequence.blocks)} blocks"
            )
        if first + count > self.num_readable(sequence):
            raise KeyError(sequence.request_id)
        blocks = sequence.blocks[first : first + count]
        self._blocks.pool.hold(blocks)
        self.lent.append(blocks)
        return blocks

    def take_back(self, blocks: list[int]) -> None:
        """End of a `lend`; `blocks` is what it returned."""
        self.lent = [other for other in self.lent if other is not blocks]
        self._blocks.pool.release(blocks)
