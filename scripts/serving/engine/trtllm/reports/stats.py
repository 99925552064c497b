"""TensorRT-LLM's iteration statistics, as far as load reports need them.

One JSON object per engine iteration, when `enable_iter_perf_stats` is on. Nested objects may be
null, and none come while nothing runs, so the adapter's own counts fill the time between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class EngineStats(Struct, frozen=True):
    """`num_*` count requests, then blocks; None: unknown."""

    num_queued: int | None = None
    num_blocks: int | None = None
    num_used_blocks: int | None = None
    tokens_per_block: int | None = None


def parse_stats(raw: Mapping[str, Any], before: EngineStats) -> EngineStats:
    """The statistics in `raw`; missing ones stay as they were `before`."""
    cache = raw.get("kvCacheStats") or {}

    def newest(value: Any, old: int | None) -> int | None:
        return old if value is None else int(value)

    return EngineStats(
        num_queued=newest(raw.get("numQueuedRequests"), before.num_queued),
        num_blocks=newest(cache.get("maxNumBlocks"), before.num_blocks),
        num_used_blocks=newest(cache.get("usedNumBlocks"), before.num_used_blocks),
        tokens_per_block=newest(cache.get("tokensPerBlock"), before.tokens_per_block),
    )
