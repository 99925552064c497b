"""One instance's KV events, applied to the prefix index in order and without loss.

NATS may lose, repeat or delay batches, and a frontend may join late. Batches of one epoch are
numbered 1, 2, 3, ..., so every such case shows. A batch that comes early is kept until the missing
one or a snapshot arrives; until then the index keeps what it had, slightly old.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from serving.kv_router.prefix_index import PrefixIndex
from serving.protocol import BlocksRemoved, BlocksStored, KvEventBatch

MAX_BUFFERED_BLOCKS = 65_536


class IndexCounters(Struct):
    """What happened to KV events, for metrics and `doctor`. All count from the start.

    `gaps`: losses noticed. `duplicates`: batches and snapshots older than the index.
    `stale_epoch`: messages of a registration that was replaced. `unregistered`: messages of an
    instance, or an epoch of it, that discovery has not shown or that was refused. `dropped`:
    batches discarded because the buffer was full before a snapshot came.
    """

    batches: int = 0
    gaps: int = 0
    duplicates: int = 0
    stale_epoch: int = 0
    unregistered: int = 0
    snapshots: int = 0
    dropped: int = 0


class KvEventStream:
    """The KV events of one registration, applied in order.

    Everything up to `last_seq` is in the index. `synchronised` is False when something after it
    is missing or may be: at first (the instance may have a history), after a gap, and after
    `distrust`. It becomes True again when the numbers close up or a snapshot arrives.
    """

    def __init__(
        self,
        index: PrefixIndex,
        instance_id: str,
        counters: IndexCounters,
        max_buffered_blocks: int = MAX_BUFFERED_BLOCKS,
    ) -> None:
        self.last_seq = 0
        self.synchronised = False
        self._index, self._instance_id, self._counters = index, instance_id, counters
        self._buffer: dict[int, KvEventBatch] = {}
        self._buffered_blocks = 0
        self._max_buffered_blocks = max_buffered_blocks

    def on_batch(self, batch: KvEventBatch) -> None:
        """Apply the batch if it is the next one, keep it if it is early, ignore it if it is old."""
        self._counters.batches += 1
        if batch.seq <= self.last_seq or batch.seq in self._buffer:
            self._counters.duplicates += 1
        elif batch.seq == self.last_seq + 1:
            self._apply(batch)
            self._catch_up()
        else:
            if self.synchronised:
                self._counters.gaps += 1
            self.synchronised = False
            self._keep(batch)

    def on_snapshot(
        self, seq: int, block_hashes: Sequence[int], host_hashes: Sequence[int] = ()
    ) -> None:
        """The instance held exactly these, on its device and its host, after batch number `seq`."""
        if seq < self.last_seq:
            self._counters.duplicates += 1
            return
        self._counters.snapshots += 1
        self._index.replace(self._instance_id, block_hashes, host_hashes)
        self.last_seq = seq
        for old in [number for number in self._buffer if number <= seq]:
            self._take(old)
        self._catch_up()

    def distrust(self) -> None:
        """Batches may have been lost at the end, where no later batch shows the gap."""
        self.synchronised = False

    def _catch_up(self) -> None:
        while self.last_seq + 1 in self._buffer:
            self._apply(self._take(self.last_seq + 1))
        self.synchronised = not self._buffer

    def _apply(self, batch: KvEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlocksStored):
                self._index.store(
                    self._instance_id, event.block_hashes, event.parent_hash, event.tier
                )
            elif isinstance(event, BlocksRemoved):
                self._index.remove(self._instance_id, event.block_hashes, event.tier)
            else:
                self._index.clear(self._instance_id)
        self.last_seq = batch.seq

    def _keep(self, batch: KvEventBatch) -> None:
        self._buffer[batch.seq] = batch
        self._buffered_blocks += _weight(batch)
        while self._buffered_blocks > self._max_buffered_blocks:
            # A snapshot most likely covers the oldest.
            self._take(min(self._buffer))
            self._counters.dropped += 1

    def _take(self, seq: int) -> KvEventBatch:
        batch = self._buffer.pop(seq)
        self._buffered_blocks -= _weight(batch)
        return batch


def _weight(batch: KvEventBatch) -> int:
    """Memory of a batch, in blocks; an empty one takes some too."""
    return 1 + sum(
        len(event.block_hashes)
        for event in batch.events
        if isinstance(event, BlocksStored | BlocksRemoved)
    )
