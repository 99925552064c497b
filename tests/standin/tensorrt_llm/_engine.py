"""Test code. The torch engine, watched: what it caches becomes events in the real engine's form."""

from __future__ import annotations

import itertools
from pathlib import Path

from serving import block_hash
from serving.config import EngineConfig
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.sequence_blocks import SequenceBlocks
from serving.engine.torch.engine import TorchEngine
from serving.protocol import EngineRequest, KvEvent

from tensorrt_llm._kv_events import KvEvents


class WatchedBlocks(SequenceBlocks):
    """Tells `kv_events` the tokens of blocks, and which requests ended within a block."""

    kv_events: KvEvents | None = None

    def store_computed(self, sequence: Sequence) -> None:
        size = self.block_size
        first, last = sequence.num_stored, sequence.num_computed // size
        if self.kv_events is not None and first < last:
            for index, value in enumerate(sequence.block_hashes(last)[first:], first):
                tokens = sequence.tokens[index * size : (index + 1) * size]
                self.kv_events.describe(value, tokens)
        super().store_computed(sequence)

    def free(self, sequence: Sequence) -> None:
        size = self.block_size
        num_full, rest = divmod(sequence.num_computed, size)
        ended = sequence.state is State.DONE and sequence.blocks and num_full == sequence.num_stored
        if self.kv_events is not None and ended and rest:
            parent = sequence.block_hashes(num_full)[-1] if num_full else None
            self.kv_events.end_partly(
                parent, sequence.tokens[num_full * size : num_full * size + rest]
            )
        super().free(sequence)


class WatchedScheduler(Scheduler):
    """Its events are in the real engine's form."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, events: KvEvents | None) -> None:
        blocks = WatchedBlocks(pool, limits.block_size)
        super().__init__(pool, limits, blocks=blocks)
        blocks.kv_events = self._kv_events = events

    def take_events(self) -> list[KvEvent]:
        events = super().take_events()
        if self._kv_events is not None:
            self._kv_events.translate(events)
        return events


class Engine(TorchEngine):
    """`event_buffer_max_size` 0: no events. Without `block_reuse` no request finds another's blocks."""

    def __init__(
        self, folder: Path, config: EngineConfig, *, event_buffer_max_size: int, block_reuse: bool
    ) -> None:
        super().__init__(folder, config, "cpu", hash_salt="standin", fingerprint="standin")
        self._event_buffer = event_buffer_max_size if block_reuse else 0
        self._block_reuse = block_reuse
        self._lone = itertools.count()
        self.salts: dict[str, str] = {}  # request id -> cache_salt, until the request is queued
        self.kv_events: KvEvents | None = None

    def new_sequence(self, request: EngineRequest) -> Sequence:
        sequence = super().new_sequence(request)
        salt = self.salts.pop(request.request_id, None)
        if not self._block_reuse:
            salt = f"{salt}#{next(self._lone)}"
        if salt is not None:
            sequence.root = block_hash.root_hash(f"{self._hash_salt}|{salt}")
        return sequence

    def _make_scheduler(self, pool: BlockPool) -> Scheduler:
        if self._event_buffer:
            block_bytes = self._runner.layout.block_bytes
            self.kv_events = KvEvents(
                self._event_buffer,
                window_size=self._limits.max_model_len,
                num_blocks=pool.num_blocks,
                num_host_blocks=self._config.host_cache_bytes // block_bytes,
            )
        return WatchedScheduler(pool, self._limits, self.kv_events)
