"""A simulated worker: the admission and the blocks of the engines, and time by the token.

Prompts are computed one after another, in the order of admission. Sequences decode together
(`decode_batch`). The two do not slow each other. A request holds blocks for its prompt and its
whole answer from the start of its prefill, or of its transfer, to its end; so nothing is preempted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

from serving.engine.core.admission import Admission, SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.exports import Exports
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.sequence_blocks import SequenceBlocks
from serving.engine.core.speed import WorkerSpeed
from serving.load_report import LoadReport
from serving.protocol import (
    EngineRequest,
    InstanceInfo,
    KvEventBatch,
    ModelCard,
    Phase,
    Role,
    SamplingParams,
)
from serving.simulate.clock import Clock
from serving.simulate.decode_batch import DecodeBatch
from serving.simulate.trace import TraceRequest

REPORT_EVERY_S = 0.02
"""Load reports come with engine steps, and are this far apart at least."""
REPORT_AT_LEAST_EVERY_S = 1.0

_UNLIMITED = 1 << 60


class WorkerRequest:
    """One request on one worker: `agg` does both phases, `decode` fetches what `prefill` holds."""

    def __init__(
        self,
        request_id: str,
        request: TraceRequest,
        phase: Phase,
        *,
        on_prefilled: Callable[[], None],
        on_done: Callable[[], None],
    ) -> None:
        """`on_prefilled` is called when the prompt is computed or fetched, `on_done` at the end."""
        self.request_id, self.request, self.phase = request_id, request, phase
        self.on_prefilled, self.on_done = on_prefilled, on_done
        self.cached_tokens = 0
        """Of the prompt, known once its prefill or transfer has begun."""
        self.sequence: Sequence

    def enter(self, arrival: int, block_size: int, capacity: int) -> None:
        """Become the worker's sequence number `arrival`; `capacity` is its pool in tokens.

        A prompt larger than the pool takes all of it.
        """
        num_prompt = min(self.request.prompt_tokens, capacity)
        # The content of blocks without a hash in the trace is the request's own.
        tokens = [arrival] * (num_prompt + (self.phase == "decode"))
        sampling = SamplingParams(max_tokens=self.request.completion_tokens)
        engine_request = EngineRequest(
            self.request_id, tokens, num_prompt, sampling, phase=self.phase
        )
        self.sequence = Sequence(engine_request, arrival, 0, block_size)
        self.sequence.hashes = self.request.block_hashes[: num_prompt // block_size]


class SimulatedWorker:
    """One instance. Its events go to `publish_kv` and `publish_load`."""

    def __init__(
        self,
        clock: Clock,
        instance_id: str,
        role: Role,
        card: ModelCard,
        num_blocks: int,
        speed: WorkerSpeed,
        *,
        publish_kv: Callable[[KvEventBatch], None],
        publish_load: Callable[[LoadReport], None],
    ) -> None:
        self.info = InstanceInfo(
            instance_id, 1, role, [], "", card, num_blocks, 1 << 20, 0, "simulated"
        )
        self.busy_s = 0.0
        """Time spent with prompts so far."""
        self._clock, self._speed, self._block_size = clock, speed, card.block_size
        self._publish_kv, self._publish_load = publish_kv, publish_load
        self._capacity = num_blocks * card.block_size
        limits = SchedulerLimits(
            block_size=card.block_size,
            max_model_len=self._capacity,
            max_batch_size=_UNLIMITED,
            max_num_batched_tokens=_UNLIMITED,
            max_waiting=_UNLIMITED,
        )
        self.pool = BlockPool(num_blocks)
        self._blocks = SequenceBlocks(self.pool, card.block_size)
        self._admission = Admission(self._blocks, limits, holds_answers=True)
        self._exports = Exports(self._blocks)
        self._arrivals = count()
        self._requests: dict[str, WorkerRequest] = {}  # waiting or admitted, by id
        self._computing: WorkerRequest | None = None
        self._computed_at_s = 0.0
        self._batch = DecodeBatch(clock, speed)
        self._seq = 0
        self._report_due = False
        self._reported_at_s = -REPORT_EVERY_S
        self._is_stopped = False
        self._keep_reporting()

    # --- requests -------------------------------------------------------------------------------

    def submit(self, request: WorkerRequest) -> None:
        """A request has arrived."""
        request.enter(next(self._arrivals), self._block_size, self._capacity)
        if request.phase == "decode":
            request.sequence.on_settled = partial(self._fetch, request)
        self._requests[request.request_id] = request
        self._admission.enqueue(request.sequence)
        self._go_on()

    def release(self, request: WorkerRequest) -> None:
        """A decode worker has fetched the blocks of a prefill."""
        self._exports.release(request.request_id)
        self._go_on()

    def stop(self) -> None:
        """No more reports."""
        self._is_stopped = True

    def check_integrity(self) -> None:
        """For tests: blocks, references, states and collections agree."""
        waiting_or_admitted = [request.sequence for request in self._requests.values()]
        holders = [*waiting_or_admitted, *self._exports.finished.values()]
        self.pool.check_integrity(sequence.blocks for sequence in holders)
        self._admission.check_integrity()

    def _go_on(self) -> None:
        """Admit what fits, in order, until a prompt is to be computed."""
        while self._computing is None:
            sequence = next(self._admission.admit_waiting(), None)
            if sequence is None:
                break
            if sequence.state is State.RUNNING:
                self._compute(self._requests[sequence.request_id])
        self._publish()

    def _compute(self, request: WorkerRequest) -> None:
        request.cached_tokens = request.sequence.num_computed
        num_tokens = request.request.prompt_tokens - request.cached_tokens
        took_s = self._speed.prefill_time_s(num_tokens)
        self._computing, self.busy_s = request, self.busy_s + took_s
        self._computed_at_s = self._clock.now_s + took_s
        self._clock.after(took_s, partial(self._computed, request))

    def _computed(self, request: WorkerRequest) -> None:
        sequence, self._computing = request.sequence, None
        sequence.num_computed = sequence.num_scheduled = sequence.num_prompt
        self._blocks.store_computed(sequence)
        if request.phase == "prefill":
            self._admission.remove(sequence)
            self._exports.hold(sequence)  # until they are fetched
            del self._requests[request.request_id]
            request.on_prefilled()
            self._go_on()
        else:
            self._decode(request)

    def _fetch(self, request: WorkerRequest) -> None:
        """The blocks of a reservation are there: the KV of the rest of its prompt is fetched."""
        request.cached_tokens = request.sequence.num_computed
        num_tokens = request.request.prompt_tokens - request.cached_tokens
        took_s = self._speed.transfer_time_s(num_tokens)
        self._clock.after(took_s, partial(self._fetched, request))

    def _fetched(self, request: WorkerRequest) -> None:
        self._admission.commit(request.sequence)
        self._decode(request)

    def _decode(self, request: WorkerRequest) -> None:
        request.on_prefilled()
        self._batch.add(request.request.completion_tokens - 1, partial(self._done, request))
        self._go_on()

    def _done(self, request: WorkerRequest) -> None:
        self._admission.remove(request.sequence)
        self._blocks.free(request.sequence)
        del self._requests[request.request_id]
        request.on_done()
        self._go_on()

    # --- events and reports ---------------------------------------------------------------------

    def _publish(self) -> None:
        events = self.pool.take_events()
        if events:
            self._seq += 1
            self._publish_kv(KvEventBatch(self.info.instance_id, 1, self._seq, events))
        if not self._report_due:
            self._report_due = True
            self._clock.at(self._reported_at_s + REPORT_EVERY_S, self._report)

    def _report(self) -> None:
        self._report_due = False
        self._reported_at_s = now_s = self._clock.now_s
        in_prefill_s = max(0.0, self._computed_at_s - now_s) if self._computing else 0.0
        in_prefill = int(in_prefill_s * self._speed.prefill_tokens_per_s)
        self._publish_load(
            LoadReport(
                instance_id=self.info.instance_id,
                epoch=1,
                num_running=len(self._admission.running) + len(self._admission.reserved),
                num_waiting=len(self._admission.waiting),
                queued_tokens=self._admission.queued_tokens + in_prefill,
                active_blocks=self.pool.num_held,
                cached_blocks=self.pool.num_cached,
                num_blocks=self.pool.num_blocks,
            )
        )

    def _keep_reporting(self) -> None:
        if not self._is_stopped:
            if self._clock.now_s - self._reported_at_s >= REPORT_AT_LEAST_EVERY_S:
                self._report()
            self._clock.after(REPORT_AT_LEAST_EVERY_S, self._keep_reporting)
