"""The measured limits of a device: copy bandwidth and matmul rate, and how busy it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds that `work` keeps the device busy; CUDA events on a GPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Median of `repeats`, after two that do not count."""
        return statistics.median([self._once(work) for _ in range(repeats + 2)][2:])

    def _once(self, work: Callable[[], object]) -> float:
        if not self._on_gpu:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes/s of a copy within the device's memory, reading and writing both counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / Stopwatch(device).seconds(lambda: target.copy_(source), 10)


def matmul_rate(device: str, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / Stopwatch(device).seconds(lambda: torch.mm(left, right, out=out), 20)


LONG_GAP_S = 20e-6
"""Kernels of one CUDA graph follow each other faster; whoever waits longer waits for the host."""


class Idle:
    """Shares of the recorded time in which no kernel, copy or fill ran. Set after `recorded`."""

    share = 0.0
    share_in_long_gaps = 0.0


@contextmanager
def recorded() -> Iterator[Idle]:
    """Record what the GPU does for whichever thread of this process; read the result afterwards."""
    result = Idle()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    try:
        yield result
    finally:
        profiler.stop()
    spans = sorted(_gpu_spans(profiler))
    if not spans:
        raise RuntimeError("the profiler recorded no GPU work")
    begin, end = spans[0]
    gaps = []
    for start, finish in spans[1:]:
        gaps.append(max(0, start - end))
        end = max(end, finish)
    total = end - begin
    result.share = sum(gaps) / total
    result.share_in_long_gaps = sum(gap for gap in gaps if gap > 1e9 * LONG_GAP_S) / total


def _gpu_spans(profiler: Any) -> Iterator[tuple[int, int]]:
    """Begin and end in ns of each kernel, copy and fill."""
    for event in profiler.profiler.kineto_results.events():
        on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
        if on_gpu and event.duration_ns() and not event.is_user_annotation():
            yield event.start_ns(), event.start_ns() + event.duration_ns()
