"""Sequences of one worker that decode together, in virtual time.

The batch counts the steps made since the start instead of the tokens of each sequence: a sequence
that joins at step n with m tokens to go is done at step n + m. So its cost does not grow with the
length of answers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from serving.engine.core.speed import Work, WorkerSpeed
from serving.simulate.clock import Clock


class DecodeBatch:
    """Each sequence is as fast as the others."""

    def __init__(self, clock: Clock, speed: WorkerSpeed) -> None:
        self._clock, self._speed = clock, speed
        self._ends: list[tuple[float, int, Callable[[], None]]] = []  # step, tie-break, callback
        self._steps, self._counted_at_s = 0.0, 0.0
        self._version = 0

    def add(self, num_tokens: int, on_done: Callable[[], None]) -> None:
        """A sequence joins; `on_done` is called when it has got `num_tokens`."""
        self._count()
        self._version += 1
        heapq.heappush(self._ends, (self._steps + num_tokens, self._version, on_done))
        self._schedule_end()

    def _count(self) -> None:
        """Account for the steps since the last change of the batch."""
        if self._ends:
            self._steps += (self._clock.now_s - self._counted_at_s) / self._step_time_s()
        self._counted_at_s = self._clock.now_s

    def _step_time_s(self) -> float:
        return self._speed.step_time_s(Work(num_decodes=len(self._ends)))

    def _schedule_end(self) -> None:
        if self._ends:
            version = self._version
            left_s = max(0.0, self._ends[0][0] - self._steps) * self._step_time_s()
            self._clock.after(left_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return  # The batch has changed meanwhile, which put this end off.
        self._count()
        end, _, on_done = heapq.heappop(self._ends)
        self._steps = max(self._steps, end)
        self._version += 1
        self._schedule_end()
        on_done()
