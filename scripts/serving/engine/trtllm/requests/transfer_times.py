"""Bytes and seconds of a fetch, from `request_perf_metrics` in versions that have it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from serving.load_report import KvTransferTotals


def count_transfer(stats: KvTransferTotals, completion: Any) -> None:
    """Add the fetch of `completion`, the last `CompletionOutput` of a decode."""
    metrics = getattr(completion, "request_perf_metrics", None)
    timing = getattr(metrics, "timing_metrics", None)
    if timing is None:
        return
    stats.kv_bytes_received += int(getattr(timing, "kv_cache_size", None) or 0)
    start = getattr(timing, "kv_cache_transfer_start", None)
    end = getattr(timing, "kv_cache_transfer_end", None)
    if start is not None and end is not None:
        stats.kv_transfer_seconds += max(0.0, _seconds(end - start))


def _seconds(span: Any) -> float:
    """Bindings give durations where the clock is a steady one, and some versions bare seconds."""
    return span.total_seconds() if isinstance(span, timedelta) else float(span)
