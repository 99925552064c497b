"""What happened in one turn of the event loop, handed to the worker in one call.

The worker sends one frame per frontend and call, so tokens of many requests that arrive together
should leave together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.engine.base import StepSink
from serving.load_report import LoadReport
from serving.protocol import BlocksRemoved, BlocksStored, EngineOutput, KvEvent


class Outbox:
    """`load` is asked with each delivery. `delivered` are the hashes that the sink knows of."""

    def __init__(self, sink: StepSink, load: Callable[[], LoadReport]) -> None:
        self._sink, self._load = sink, load
        self._call_soon = asyncio.get_running_loop().call_soon
        self._outputs: list[EngineOutput] = []
        self._events: list[KvEvent] = []
        self._is_due = False
        self.delivered: set[int] = set()

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        if not self._is_due:
            self._is_due = True
            self._call_soon(self.flush)

    def put_events(self, events: list[KvEvent]) -> None:
        if events:
            self._events += events
            if not self._is_due:
                self._is_due = True
                self._call_soon(self.flush)

    def flush(self) -> None:
        """Deliver now; also called by the loop, which then finds nothing."""
        self._is_due = False
        outputs, events = self._outputs, self._events
        if not outputs and not events:
            return
        self._outputs, self._events = [], []
        for event in events:
            if isinstance(event, BlocksStored):
                self.delivered.update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                self.delivered.difference_update(event.block_hashes)
            else:
                self.delivered.clear()
        self._sink(outputs, events, self._load())
