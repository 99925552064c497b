"""The scheduler as the event loop and the compute thread share it, and the way to the sink.

One lock guards all bookkeeping; it is never held while the model computes, so requests, aborts and
reservations take effect while a step runs. Whatever happens goes into the outbox in order, and the
event loop delivers it to the sink from there. Knows no tensors.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from serving.engine.base import StepSink
from serving.engine.core.host_tier import Copies
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence
from serving.engine.core.step import Chunk, StepPlan
from serving.load_report import LoadReport
from serving.protocol import (
    BlocksRemoved,
    BlocksStored,
    EngineOutput,
    KvEvent,
    Tier,
    TokenLogprob,
)

# A waiting compute thread looks up this often even if nobody woke it.
_IDLE_S = 60.0


class SharedScheduler:
    """Everything here takes the lock. `scheduler` is set once the compute thread has loaded."""

    scheduler: Scheduler

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._is_closing = False
        self._failure = ""
        self._outbox: list[tuple[list[EngineOutput], list[KvEvent]]] = []
        self._delivered: dict[Tier, set[int]] = {"device": set(), "host": set()}  # hashes
        self._loop: asyncio.AbstractEventLoop
        self._sink: StepSink

    def connect(self, sink: StepSink) -> None:
        """Deliver to `sink` on the running event loop."""
        self._loop, self._sink = asyncio.get_running_loop(), sink

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more; empty while it can."""
        return self._failure

    @property
    def refusal(self) -> str:
        """Why no request can be taken any more; empty while requests are welcome."""
        return self._failure or ("the engine is closing" if self._is_closing else "")

    # --- for the event loop --------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """See `Scheduler.add`."""
        with self._work:
            self.scheduler.add(sequence)
            self._work.notify_all()

    def change(self, action: Callable[[], None]) -> None:
        """Change the scheduler, let the compute thread see it, and deliver what came of it."""
        with self._work:
            action()
            self.scheduler.admit_reservations()
            self._post()
            self._work.notify_all()
        # Not delivered from here: a sink may be what called us.
        self._loop.call_soon(self.deliver)

    def expire(self, now: float) -> float | None:
        """See `Scheduler.expire`."""
        due: float | None = None

        def expire() -> None:
            nonlocal due
            due = self.scheduler.expire(now)

        self.change(expire)
        return due

    def locked(self) -> AbstractContextManager[object]:
        """The lock, to read the scheduler or to change it without any output."""
        return self._lock

    def load(self) -> LoadReport:
        with self._lock:
            return self.scheduler.load()

    def snapshot(self, tier: Tier) -> list[int]:
        """Hashes that the sink knows from the events delivered so far."""
        return list(self._delivered[tier])

    def check_integrity(self) -> None:
        with self._lock:
            self.scheduler.check_integrity()

    def wake(self) -> None:
        """Let a waiting compute thread look for work."""
        with self._work:
            self._work.notify_all()

    def close(self) -> None:
        """The compute thread gets no more steps."""
        with self._work:
            self._is_closing = True
            self._work.notify_all()

    def deliver(self) -> None:
        """Hand the outbox to the sink in one call, on the event loop."""
        with self._lock:
            self._post()
            posted, self._outbox = self._outbox, []
            load = self.scheduler.load()
        if self._is_closing and not posted:
            return  # the engine's `close` has made the last delivery
        outputs = [output for batch, _ in posted for output in batch]
        events = [event for _, batch in posted for event in batch]
        for event in events:
            if isinstance(event, BlocksStored):
                self._delivered[event.tier].update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                self._delivered[event.tier].difference_update(event.block_hashes)
        self._sink(outputs, events, load)

    # --- for the compute thread ----------------------------------------------------------------

    def on_loop(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the event loop soon. From any thread."""
        self._loop.call_soon_threadsafe(callback)

    def next_step(self, *, is_ahead: bool) -> StepPlan | None:
        """The next step; None when closing. Waits for work unless a step is under way."""
        with self._work:
            while not self._is_closing:
                plan = self.scheduler.plan_step(is_ahead=is_ahead)
                if plan or is_ahead:
                    return plan
                if self._post():  # nothing to compute, yet evictions or admissions happened
                    self.on_loop(self.deliver)
                self._work.wait(_IDLE_S)
            return None

    def launched(self, chunks: list[Chunk]) -> None:
        with self._lock:
            self.scheduler.launched(chunks)

    def copied(self, copies: Copies) -> None:
        with self._lock:
            self.scheduler.pool.copied(copies)

    def complete(
        self, chunks: list[Chunk], tokens: list[int], logprobs: list[TokenLogprob | None]
    ) -> None:
        """See `Scheduler.complete`. The caller delivers."""
        with self._lock:
            self.scheduler.complete(chunks, tokens, logprobs)
            self._after_step()

    def fail(self, chunks: list[Chunk], message: str) -> None:
        """A step raised: end its requests."""
        with self._lock:
            self.scheduler.fail(chunks, message)
            self._after_step()
        self.on_loop(self.deliver)

    def fail_all(self, message: str) -> None:
        """Nothing can be computed any more: end all requests and refuse new ones."""
        with self._lock:
            self._failure = message
            self.scheduler.fail_all(message)
            self._post()
        self.on_loop(self.deliver)

    def _after_step(self) -> None:
        self.scheduler.admit_reservations()
        self._post()

    def _post(self) -> bool:
        """Move what happened into the outbox. Called under the lock."""
        outputs, events = self.scheduler.take_outputs(), self.scheduler.take_events()
        if outputs or events:
            self._outbox.append((outputs, events))
        return bool(outputs or events)
