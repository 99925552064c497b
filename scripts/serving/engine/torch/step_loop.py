"""Steps one after the other on the compute thread: copy, launch, and complete.

While a step runs, the next one is planned and launched, as far ahead as the runner allows. A step
that cannot be launched is repeated one request at a time, so that only the requests that it cannot
be computed with end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.engine.core.host_tier import Copies
from serving.engine.core.sequence import State
from serving.engine.core.step import Chunk, StepPlan
from serving.engine.core.step_clock import StepClock
from serving.engine.torch.kv.host_blocks import HostBlocks
from serving.engine.torch.runner import Launched, ModelRunner
from serving.engine.torch.shared_scheduler import SharedScheduler

log = logging.getLogger(__name__)

NO_COPIES = Copies(0, [], [], [])


@dataclass
class _Step:
    """A step under way: copies between the tiers, then what is computed. Either may be nothing."""

    launched: Launched
    copies: Copies
    wait_for_copies: Callable[[], None] = lambda: None


class StepLoop:
    """Runs the plans of a scheduler. Used by one thread, inside `torch.inference_mode`."""

    def __init__(
        self, scheduler: SharedScheduler, runner: ModelRunner, host: HostBlocks | None
    ) -> None:
        self._scheduler, self._runner, self._host = scheduler, runner, host
        self._under_way: deque[_Step] = deque()
        self.clock = StepClock()

    def run(self) -> None:
        """Until the scheduler closes. An exception means that the bookkeeping or the device failed."""
        under_way = self._under_way
        while (plan := self._scheduler.next_step(is_ahead=bool(under_way))) is not None:
            step = self._launch(plan)
            if step is not None:
                under_way.append(step)
            if under_way and (step is None or len(under_way) >= self._runner.depth):
                self._complete(under_way.popleft())
                self._scheduler.on_loop(self._scheduler.deliver)
        while under_way:
            self._complete(under_way.popleft())

    def _launch(self, plan: StepPlan) -> _Step | None:
        """None where nothing is under way: nothing was to be done, or it failed at once."""
        step = _Step(Launched([], None), plan.copies)
        if plan.copies:
            # What this raises ends the engine: blocks that were not copied would stay wrong.
            assert self._host is not None, "there are no copies without a host tier"
            step.wait_for_copies = self._host.run(plan.copies)
        if plan.chunks:
            self.clock.begin(sum(chunk.length for chunk in plan.chunks))
            try:
                step.launched = self._runner.launch(plan.chunks)
            except Exception as exc:
                self.clock.cancel()
                self._repeat_one_by_one(plan.chunks, exc)
            self._scheduler.launched(step.launched.chunks)
        return step if step.copies or step.launched.chunks else None

    def _complete(self, step: _Step) -> None:
        if step.copies:
            step.wait_for_copies()
            self._scheduler.copied(step.copies)
        chunks = step.launched.chunks
        try:
            tokens, logprobs = step.launched.result()
        except Exception as exc:
            self._fail(chunks, exc)
            return
        finally:
            if chunks:
                self.clock.end()
        self._scheduler.complete(chunks, tokens, logprobs)

    def _repeat_one_by_one(self, chunks: list[Chunk], exc: Exception) -> None:
        """A step raised before it was under way: compute its requests alone, and fail those alone
        that raise again."""
        if len(chunks) == 1:
            self._fail(chunks, exc)
            return
        log.error("a step of %d requests failed; each is computed alone", len(chunks), exc_info=exc)
        self._runner.prove()
        while self._under_way:  # steps complete in their order
            self._complete(self._under_way.popleft())
        for chunk in chunks:
            if chunk.sequence.state is State.DONE:
                self._scheduler.fail([chunk], "")  # it is over; this only ends its part
                continue
            self.clock.begin(chunk.length)
            try:
                launched = self._runner.launch([chunk])
            except Exception as alone:
                self.clock.cancel()
                self._fail([chunk], alone)
                continue
            self._scheduler.launched(launched.chunks)
            self._complete(_Step(launched, NO_COPIES))
        self._scheduler.on_loop(self._scheduler.deliver)

    def _fail(self, chunks: list[Chunk], exc: Exception) -> None:
        log.error("a step of %d requests failed", len(chunks), exc_info=exc)
        self._scheduler.fail(chunks, f"{type(exc).__name__}: {exc}")
        self._runner.prove()
