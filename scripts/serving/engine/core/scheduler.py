"""The life of every request in an engine: queued, computed in steps, exported or ended.

Joins `admission` (who runs), `step` (what is computed next) and `exports` (what decode workers
fetch), and turns computed tokens into outputs. Pure bookkeeping over a `BlockPool`; no tensors, no
threads (the engine locks around every call).

Between `plan_step` and `complete` the sequences of a step are in flight: an abort reports the end
at once, and the blocks are freed when the step is over. A step may be planned while the one before
is under way, on the assumption that no sequence ends in that one but by its length. Where a stop
token proves this wrong, the surplus is dropped. Steps complete in the order of their plans.
"""

from __future__ import annotations

from collections.abc import Iterable

from serving.engine.core.admission import Admission, SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.exports import Exports
from serving.engine.core.sequence import UNKNOWN_TOKEN, Sequence, State
from serving.engine.core.sequence_blocks import SequenceBlocks
from serving.engine.core.step import Chunk, StepPlan, StepPlanner
from serving.errors import InvalidRequest, QueuedTooLong
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, ErrorInfo, FinishReason, KvEvent, TokenLogprob


class Scheduler:
    """All sequences of an engine, each in the one collection that its state names."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, *, blocks: SequenceBlocks | None = None
    ) -> None:
        """`blocks` watches or replaces how sequences use the pool."""
        self.pool, self.limits = pool, limits
        self._blocks = SequenceBlocks(pool, limits.block_size) if blocks is None else blocks
        self._admission = Admission(self._blocks, limits)
        self._planner = StepPlanner(self._admission, limits)
        self._exports = Exports(self._blocks)
        self._live: dict[str, Sequence] = {}  # waiting, running or reserved
        self._aborted_in_flight: list[Sequence] = []
        self._outputs: list[EngineOutput] = []

    @property
    def waiting(self) -> list[Sequence]:
        return self._admission.waiting

    @property
    def running(self) -> list[Sequence]:
        return self._admission.running

    @property
    def exported(self) -> dict[str, Sequence]:
        """Finished prefills whose blocks are held, by request id."""
        return self._exports.finished

    @property
    def preemptions(self) -> int:
        return self._planner.preemptions

    # --- requests ------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises InvalidRequest for an id in use, Overloaded when the queue is full."""
        request_id = sequence.request_id
        if request_id in self._live or request_id in self.exported:
            raise InvalidRequest(f"request id {request_id} is in use", code="duplicate_request")
        self._admission.enqueue(sequence)
        self._live[request_id] = sequence

    def abort(self, request_id: str) -> None:
        """End it as cancelled and free its blocks. An export is released without an output."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._finish(sequence, EngineOutput(request_id, [], "cancelled"))
        else:
            self.release_export(request_id)

    def discard(self, sequence: Sequence) -> None:
        """Forget a reservation, waiting or filled in part, without an output."""
        if self._live.get(sequence.request_id) is sequence:
            self._finish(sequence, None)

    def refuse(self, sequence: Sequence, error: ErrorInfo) -> None:
        """End this one request with an error."""
        if self._live.get(sequence.request_id) is sequence:
            self._finish(sequence, EngineOutput(sequence.request_id, [], "error", error=error))

    def expire(self, now: float) -> float | None:
        """End the requests that waited for too long to begin.

        Takes the loop's time and returns when the next request will have waited for too long.
        """
        for sequence in self._admission.expired(now):
            exc = QueuedTooLong(
                f"it waited in the queue of a worker for {sequence.request.queue_s:g} s "
                "(`deadlines.queue_s`)"
            )
            self.refuse(sequence, ErrorInfo.from_error(exc))
        return self._admission.next_expiry()

    def commit(self, sequence: Sequence, token: int | None = None) -> None:
        """A reservation's blocks are filled: store them and let it decode.

        `token` is its last one, if that was unknown when it was reserved.
        """
        if token is not None:
            sequence.tokens[-1] = token
        self._admission.commit(sequence)

    def admit_reservations(self) -> None:
        """Admit reservations at the head of the queue without waiting for the next step."""
        self._admission.admit_reservations()

    def request_ids(self) -> list[str]:
        """Every request that holds or waits for blocks."""
        return [*self._live, *self.exported]

    # --- exports -------------------------------------------------------------------------------

    def num_exportable(self, request_id: str) -> int:
        """Leading blocks of a prefill that a transfer may read; 0 for an unknown request."""
        return self._exports.num_readable(self._find(request_id))

    def lend(self, request_id: str, first: int, count: int) -> list[int]:
        """See `Exports.lend`. Raises KeyError for an unknown request, too."""
        sequence = self._find(request_id)
        if sequence is None:
            raise KeyError(request_id)
        return self._exports.lend(sequence, first, count)

    def take_back(self, blocks: list[int]) -> None:
        """End of a `lend`; `blocks` is what it returned."""
        self._exports.take_back(blocks)

    def release_export(self, request_id: str) -> None:
        """Free the blocks of a finished prefill. Unknown ids are ignored."""
        self._exports.release(request_id)

    def _find(self, request_id: str) -> Sequence | None:
        return self.exported.get(request_id) or self._live.get(request_id)

    # --- steps ---------------------------------------------------------------------------------

    def plan_step(self, *, is_ahead: bool = False) -> StepPlan:
        """The next step: every running decode, then prefill chunks, then new admissions.

        It has no chunks when nothing can run: there is no request, or held exports and
        reservations take all room. `is_ahead`: a step is under way. Then it also has none where a
        request would have to be preempted, because the tokens of that step are needed for it.
        """
        chunks = self._planner.plan(is_ahead=is_ahead)
        return StepPlan(chunks, self.pool.take_copies())

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """The step is under way: a later one may count on the tokens that it is choosing."""
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(UNKNOWN_TOKEN)
                chunk.sequence.num_unknown += 1

    def complete(
        self, chunks: list[Chunk], tokens: list[int], logprobs: list[TokenLogprob | None]
    ) -> None:
        """Account for a computed step. `tokens` and `logprobs` are those of the sampling chunks."""
        sampled = iter(zip(tokens, logprobs, strict=True))
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            outcome = next(sampled) if chunk.samples else None
            if sequence.state is State.DONE:
                continue
            sequence.num_computed += chunk.length
            sequence.num_readable = sequence.num_computed
            self._blocks.store_computed(sequence)
            if outcome is not None:
                self._append(sequence, *outcome)
            elif sequence.request.phase == "prefill":  # its blocks so far may be exported
                self._outputs.append(EngineOutput(sequence.request_id, []))
        self._free_aborted()

    def fail(self, chunks: list[Chunk], message: str) -> None:
        """The step raised: its requests end with an error, all others go on."""
        for chunk in chunks:
            chunk.sequence.in_flight -= 1
            if chunk.sequence.state is not State.DONE:
                self._fail(chunk.sequence, message)
        self._free_aborted()

    def fail_all(self, message: str) -> None:
        """The engine itself is broken: end every live request with an error."""
        for sequence in list(self._live.values()):
            sequence.in_flight = 0
            self._fail(sequence, message)

    # --- what happened -------------------------------------------------------------------------

    def take_outputs(self) -> list[EngineOutput]:
        """Outputs since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_events(self) -> list[KvEvent]:
        """Cache changes since the last call, in order."""
        return self.pool.take_events()

    def load(self) -> LoadReport:
        in_prefill = sum(s.remaining for s in self.running if s.remaining > 1)
        return LoadReport(
            num_running=len(self.running) + len(self._admission.reserved),
            num_waiting=len(self.waiting),
            queued_tokens=self._admission.queued_tokens + in_prefill,
            active_blocks=self.pool.num_held,
            cached_blocks=self.pool.num_cached,
            num_blocks=self.pool.num_blocks,
            preemptions=self.preemptions,
            host_cached_blocks=len(self.pool.host),
            num_host_blocks=self.pool.host.num_blocks,
            offloaded_blocks=self.pool.host.num_offloaded,
            onloaded_blocks=self.pool.host.num_onloaded,
        )

    def check_integrity(self) -> None:
        """For tests: blocks, references, states and collections agree."""
        holders = [*self._live.values(), *self.exported.values(), *self._aborted_in_flight]
        self.pool.check_integrity([*(s.blocks for s in holders), *self._exports.lent])
        self._admission.check_integrity()
        admitted = [*self.waiting, *self.running, *self._admission.reserved.values()]
        assert {id(s) for s in admitted} == {id(s) for s in self._live.values()}, (
            "a live request is in no collection"
        )

    # --- progress and end ----------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Account for a sampled token: report it, and finish where the request says so."""
        cached: int | None = None
        prompt: list[TokenLogprob] | None = None
        if not sequence.has_reported_cached and sequence.num_cached is not None:
            if sequence.wants_prompt_logprobs:
                prompt, sequence.wants_prompt_logprobs = sequence.prompt_logprobs, False
            cached = min(sequence.num_cached, sequence.num_prompt)
            sequence.has_reported_cached = True
        request_id = sequence.request_id
        index = len(sequence.tokens) - sequence.num_unknown
        sequence.num_unknown -= 1
        if sequence.request.pooling is not None:
            del sequence.tokens[index:]  # nobody asked for it
            self._finish(
                sequence,
                EngineOutput(request_id, [], "stop", cached, embedding=sequence.embedding),
            )
            return
        guidance = sequence.guidance
        if guidance is not None and (error := guidance.error):
            # The token was chosen without a grammar: even one that would stop means nothing.
            self.refuse(sequence, error)
            return
        if token in sequence.sampling.stop_token_ids:
            # A later step may have been planned for it: that one is dropped as it completes.
            del sequence.tokens[index:]
            self._finish(
                sequence,
                EngineOutput(request_id, [], "stop", cached, token, prompt_logprobs=prompt),
            )
            return
        sequence.tokens[index] = token
        is_full = sequence.num_unknown == 0 and self._planner.is_full(sequence)
        reason: FinishReason | None = "length" if is_full else None
        if guidance is not None:
            guidance.accept(token)
            if error := guidance.error:
                self.refuse(sequence, error)
                return
            if guidance.is_complete:
                reason = "stop"
        logprobs = None if logprob is None else [logprob]
        output = EngineOutput(
            request_id, [token], reason, cached, logprobs=logprobs, prompt_logprobs=prompt
        )
        if reason is not None:
            self._finish(sequence, output)
        else:
            self._outputs.append(output)

    def _fail(self, sequence: Sequence, message: str) -> None:
        error = ErrorInfo("EngineFailed", message)
        self._finish(sequence, EngineOutput(sequence.request_id, [], "error", error=error))

    def _finish(self, sequence: Sequence, output: EngineOutput | None) -> None:
        """Out of every collection; blocks are freed, kept for export, or freed after the step."""
        del self._live[sequence.request_id]
        self._admission.remove(sequence)
        is_settled = sequence.state is State.RUNNING
        sequence.state = State.DONE
        has_result = output is not None and output.finish_reason in ("stop", "length")
        if has_result and sequence.request.phase == "prefill":
            self._exports.hold(sequence)
        elif sequence.in_flight:
            self._aborted_in_flight.append(sequence)
        else:
            self._blocks.free(sequence)
        if output is not None:
            self._outputs.append(output)
        if not is_settled and sequence.on_settled is not None:
            sequence.on_settled()  # does nothing if it was called before

    def _free_aborted(self) -> None:
        """Free the blocks of aborted requests that no step computes any more."""
        for sequence in self._aborted_in_flight:
            if not sequence.in_flight:
                self._blocks.free(sequence)
        self._aborted_in_flight = [s for s in self._aborted_in_flight if s.in_flight]
