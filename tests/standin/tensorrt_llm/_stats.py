"""Test code. Iteration statistics in the real engine's JSON: its keys, with nulls where it has them."""

from __future__ import annotations

import json
import time
from typing import Any

from serving.load_report import LoadReport
from serving.protocol import EngineOutput

from tensorrt_llm import _contract
from tensorrt_llm._settings import Settings

# The cache's numbers are left out now and then, as the contract allows.
_WITHOUT_CACHE = 5


class Stats:
    """One JSON object per step. Keys that the stand-in has no number for are 0 or null."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._num_steps = self._num_completed = self._reused = 0
        self._last = time.monotonic()
        layout = _contract.structure("stats")
        self._top: list[str] = layout["top"]
        self._cache: list[str] = layout["kvCacheStats"]
        self._inflight: list[str] = layout["inflightBatchingStats"]
        self._nullable: list[str] = layout["optional_objects"]

    def of_step(self, outputs: list[EngineOutput], load: LoadReport) -> str:
        step, self._num_steps = self._num_steps, self._num_steps + 1
        before, self._last = self._last, time.monotonic()
        self._num_completed += sum(output.finish_reason is not None for output in outputs)
        size = self._settings.tokens_per_block
        self._reused += sum((output.cached_tokens or 0) // size for output in outputs)
        values = {
            "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
            "iter": step,
            "iterLatencyMS": 1000 * (self._last - before),
            "numActiveRequests": load.num_running,
            "numQueuedRequests": load.num_waiting,
            "numCompletedRequests": self._num_completed,
            "maxNumActiveRequests": self._settings.max_batch_size,
            "maxBatchSizeRuntime": self._settings.max_batch_size,
            "maxNumTokensRuntime": self._settings.max_num_tokens,
            "inflightBatchingStats": self._in_flight(outputs, load),
        }
        stats: dict[str, Any] = {
            key: values.get(key, None if key in self._nullable else 0) for key in self._top
        }
        if step % _WITHOUT_CACHE != _WITHOUT_CACHE - 1:
            stats["kvCacheStats"] = self._of_cache(load)
        return json.dumps(stats)

    def _of_cache(self, load: LoadReport) -> dict[str, Any]:
        # Blocks kept for reuse count as free.
        values = {
            "maxNumBlocks": load.num_blocks,
            "freeNumBlocks": load.num_blocks - load.active_blocks,
            "usedNumBlocks": load.active_blocks,
            "tokensPerBlock": self._settings.tokens_per_block,
            "reusedBlocks": self._reused,
            "cacheHitRate": 0.0,
        }
        return {key: values.get(key, 0) for key in self._cache}

    def _in_flight(self, outputs: list[EngineOutput], load: LoadReport) -> dict[str, Any]:
        values = {
            "numScheduledRequests": load.num_running,
            "numGenRequests": len(outputs),
            "numCtxTokens": load.queued_tokens,
        }
        return {key: values.get(key, 0) for key in self._inflight}
