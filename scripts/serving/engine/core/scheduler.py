"""Decides what each step computes: admission, chunked prefill beside decode, preemption, finish.

Pure bookkeeping over a `BlockPool`; no tensors, no threads (the engine locks around every call).
Between `schedule` and `complete` the sequences of the step are in flight: aborting one tells the
caller at once, and its blocks are freed when the step is over.

A step may be scheduled while the one before is under way, on the assumption that no sequence ends
in that one but by its length. Where a stop token proves this wrong, what was computed too much is
dropped. Steps complete in the order in which they were scheduled.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from serving.engine.base import EngineLoad
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.sequence import UNKNOWN_TOKEN, Chunk, Sequence, State
from serving.errors import InvalidRequest, Overloaded, QueuedTooLong
from serving.protocol import EngineOutput, ErrorInfo, FinishReason, KvEvent, TokenLogprob

# Prompt tokens in a step whose log-probabilities are told: each needs a row of logits.
_MAX_REPORTED = 256


@dataclass(frozen=True)
class SchedulerLimits:
    """See `config.EngineConfig` for meanings."""

    block_size: int
    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int
    max_waiting: int


@dataclass
class Scheduler:
    """All sequences of an engine, each in the one collection that its state names."""

    pool: BlockPool
    limits: SchedulerLimits
    waiting: list[Sequence] = field(default_factory=list)  # by arrival
    running: list[Sequence] = field(default_factory=list)  # by arrival
    reserved: dict[str, Sequence] = field(default_factory=dict)
    exported: dict[str, Sequence] = field(default_factory=dict)
    lent: list[list[int]] = field(default_factory=list)  # to copies under way
    preemptions: int = 0
    _live: dict[str, Sequence] = field(default_factory=dict)  # waiting, running or reserved
    _zombies: list[Sequence] = field(default_factory=list)  # aborted in flight
    _computing: dict[int, Sequence] = field(default_factory=dict)  # block hash -> who computes it
    _outputs: list[EngineOutput] = field(default_factory=list)
    _num_reportable: int = 0  # of `_MAX_REPORTED`, left in the step being scheduled

    # --- requests ------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises InvalidRequest for an id in use, Overloaded when the queue is full."""
        request_id = sequence.request_id
        if request_id in self._live or request_id in self.exported:
            raise InvalidRequest(f"request id {request_id} is in use", code="duplicate_request")
        if len(self.waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting in this worker")
        sequence.num_uncached = self._num_uncached(sequence)
        self._live[request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """End it as cancelled, free its blocks; exports are released without an output."""
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
        """End it with an error that is its own."""
        if self._live.get(sequence.request_id) is sequence:
            self._finish(sequence, EngineOutput(sequence.request_id, [], "error", error=error))

    def expire(self, now: float) -> float | None:
        """End what has waited for too long to begin. Returns when the next one will have."""
        for sequence in list(self.waiting):
            if sequence.queued_until is not None and now >= sequence.queued_until:
                exc = QueuedTooLong(
                    f"it waited in the queue of a worker for {sequence.request.queue_s:g} s "
                    "(`deadlines.queue_s`)"
                )
                self.refuse(sequence, ErrorInfo("QueuedTooLong", str(exc), exc.retry_after_s))
        return min(
            (s.queued_until for s in self.waiting if s.queued_until is not None), default=None
        )

    def lend(self, request_id: str, first: int, count: int) -> list[int]:
        """Blocks of a prefill, held until `take_back` whatever becomes of the request.

        Raises KeyError when it has not computed them (any more), ValueError when it never will.
        """
        sequence = self.exported.get(request_id) or self._live.get(request_id)
        if sequence is None:
            raise KeyError(request_id)
        if first < 0 or 0 < len(sequence.blocks) < first + count:
            raise ValueError(
                f"{count} blocks from block {first} do not match {len(sequence.blocks)} blocks"
            )
        if first + count > self.num_exportable(request_id):
            raise KeyError(request_id)
        blocks = sequence.blocks[first : first + count]
        self.pool.hold(blocks)
        self.lent.append(blocks)
        return blocks

    def take_back(self, blocks: list[int]) -> None:
        """End of a `lend`; `blocks` is what it returned."""
        self.lent = [other for other in self.lent if other is not blocks]
        self.pool.release(blocks)

    def num_exportable(self, request_id: str) -> int:
        """Leading blocks of a prefill whose KV is complete: full ones while it is being computed,
        all when it is finished, 0 for a request that is unknown or none."""
        if sequence := self.exported.get(request_id):
            return len(sequence.blocks)
        live = self._live.get(request_id)
        if live is None or live.request.phase != "prefill" or live.state is not State.RUNNING:
            return 0
        num_full = live.num_readable // self.limits.block_size
        return self.pool.num_arrived(live.blocks[:num_full])

    def release_export(self, request_id: str) -> None:
        sequence = self.exported.pop(request_id, None)
        if sequence is not None:
            sequence.state = State.DONE
            self._free(sequence)

    def commit(self, sequence: Sequence, token: int | None = None) -> None:
        """A reservation's blocks are filled: store them and let it decode.

        `token` is its last one, where that was not known when it was reserved.
        """
        assert sequence.state is State.RESERVED
        if token is not None:
            sequence.tokens[-1] = token
        del self.reserved[sequence.request_id]
        sequence.num_computed = len(sequence.request.token_ids) - 1
        sequence.num_scheduled = sequence.num_computed
        sequence.num_cached = sequence.num_computed
        self._store_full_blocks(sequence)
        sequence.state = State.RUNNING
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)

    # --- steps ---------------------------------------------------------------------------------

    def schedule(self, *, is_ahead: bool = False) -> list[Chunk]:
        """The next step: every running decode, then prefill chunks, then new admissions.

        Empty when nothing can run (nothing there, or held exports and reservations take all
        room). `is_ahead`: a step is under way; then also empty where a request would have to be
        preempted, because the tokens of that step are needed for it.
        """
        if is_ahead and not self._has_room_for_decodes():
            return []
        self._num_reportable = _MAX_REPORTED
        chunks = self._schedule_decodes()
        # Prefill never starves, even where decodes alone fill the budget.
        budget = max(self.limits.block_size, self.limits.max_num_batched_tokens - len(chunks))
        for sequence in self.running:
            if budget > 0 and sequence.remaining > 1:
                budget -= self._add_chunk(chunks, sequence, budget)
        for sequence in list(self.waiting):
            if budget <= 0:
                break
            if not sequence.is_ready:
                continue  # its grammar is being compiled
            if self._is_being_computed(sequence):
                continue  # the leading blocks come for free when the other one has them
            if not self._admit(sequence):
                break
            if sequence.state is State.RUNNING:
                budget -= self._add_chunk(chunks, sequence, budget)
        return chunks

    def admit_reservations(self) -> None:
        """Let reservations at the head of the queue in, without waiting for the next step."""
        while self.waiting and self.waiting[0].is_reservation:
            if not self._admit(self.waiting[0]):
                break

    def launched(self, chunks: list[Chunk]) -> None:
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
            self._store_full_blocks(sequence)
            if outcome is not None:
                self._append(sequence, *outcome)
            elif sequence.request.phase == "prefill":  # its blocks so far may be exported
                self._outputs.append(EngineOutput(sequence.request_id, []))
        self._bury_zombies()

    def fail(self, chunks: list[Chunk], message: str) -> None:
        """The step raised: its requests end with an error, all others go on."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            if sequence.state is not State.DONE:
                error = ErrorInfo("EngineFailed", message)
                self._finish(sequence, EngineOutput(sequence.request_id, [], "error", error=error))
        self._bury_zombies()

    def fail_all(self, message: str) -> None:
        """The engine itself is broken: end every live request with an error."""
        for sequence in list(self._live.values()):
            sequence.in_flight = 0
            error = ErrorInfo("EngineFailed", message)
            self._finish(sequence, EngineOutput(sequence.request_id, [], "error", error=error))

    def request_ids(self) -> list[str]:
        """Everything that holds or waits for blocks."""
        return [*self._live, *self.exported]

    # --- what happened -------------------------------------------------------------------------

    def take_outputs(self) -> list[EngineOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_events(self) -> list[KvEvent]:
        return self.pool.take_events()

    def load(self) -> EngineLoad:
        partly = sum(s.remaining for s in self.running if s.remaining > 1)
        return EngineLoad(
            num_running=len(self.running) + len(self.reserved),
            num_waiting=len(self.waiting),
            queued_tokens=sum(s.num_uncached for s in self.waiting) + partly,
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
        holders = [*self._live.values(), *self.exported.values(), *self._zombies]
        self.pool.check_integrity([*(s.blocks for s in holders), *self.lent])
        live = {id(s) for s in [*self.waiting, *self.running, *self.reserved.values()]}
        assert live == {id(s) for s in self._live.values()}, "a live request is in no collection"
        assert all(not s.blocks for s in self.waiting), "a waiting request holds blocks"
        running = {id(s) for s in self.running}
        assert all(id(s) in running for s in self._computing.values()), "stale computing entry"

    # --- admission and room --------------------------------------------------------------------

    def _num_uncached(self, sequence: Sequence) -> int:
        """Tokens that it will have to compute, as far as can be said when it arrives."""
        num_tokens = len(sequence.tokens)
        if sequence.is_reservation:
            return 1
        if sequence.wants_prompt_logprobs:
            return num_tokens
        hashes = sequence.block_hashes((num_tokens - 1) // self.limits.block_size)
        return num_tokens - self.pool.num_stored(hashes) * self.limits.block_size

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running request is about to store the next block that this one needs."""
        if not self._computing or sequence.is_reservation or sequence.wants_prompt_logprobs:
            return False
        hashes = sequence.block_hashes((len(sequence.tokens) - 1) // self.limits.block_size)
        num_stored = self.pool.num_stored(hashes)
        return num_stored < len(hashes) and hashes[num_stored] in self._computing

    def _admit(self, sequence: Sequence) -> bool:
        """Give it its blocks if there is room; it then runs, or is reserved."""
        if len(self.running) + len(self.reserved) >= self.limits.max_batch_size:
            return False
        # A prompt found whole still needs one token computed, or there would be no logits; a
        # reservation brings that token along and needs the KV of the others only.
        num_kv = len(sequence.tokens) - 1
        hashes = sequence.block_hashes(num_kv // self.limits.block_size)
        # Of a prompt that is to be computed whole, nothing counts as known.
        known = [] if sequence.wants_prompt_logprobs else hashes
        matched = self.pool.match(known)
        num_blocks = self._num_blocks(num_kv if sequence.is_reservation else num_kv + 1)
        num_new = num_blocks - len(matched)
        # Room for each running sequence to grow, so that an admission does not preempt at once.
        if not self.pool.fits(matched, num_new + len(self.running)):
            return False
        self.waiting.remove(sequence)
        sequence.queued_until = None
        sequence.blocks, sequence.num_stored = self.pool.claim(matched, known, num_new)
        sequence.num_computed = sequence.num_stored * self.limits.block_size
        sequence.num_scheduled = sequence.num_computed
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        if sequence.on_settled is not None:
            sequence.state = State.RESERVED
            self.reserved[sequence.request_id] = sequence
            self.pool.host.when_copied(sequence.on_settled)  # a transfer writes at any time
            return True
        sequence.state = State.RUNNING
        for value in hashes[sequence.num_stored :]:
            self._computing.setdefault(value, sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
        return True

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            # Some may have been preempted by an earlier one just now.
            can_decode = sequence.state is State.RUNNING and self._can_decode(sequence)
            if can_decode and self._make_room(sequence):
                self._add_chunk(chunks, sequence, 1)
        return chunks

    def _can_decode(self, sequence: Sequence) -> bool:
        if sequence.remaining > 1:
            return False  # in prefill
        if sequence.num_unknown == 0:
            return True
        return not (self._is_full(sequence) or sequence.needs_token_values)

    def _is_full(self, sequence: Sequence) -> bool:
        """Whether its last token, known or not, ends it."""
        return (
            sequence.num_output >= sequence.sampling.max_tokens
            or len(sequence.tokens) >= self.limits.max_model_len
            or sequence.request.phase == "prefill"
        )

    def _has_room_for_decodes(self) -> bool:
        needed = sum(
            self._num_blocks(len(s.tokens)) > len(s.blocks)
            for s in self.running
            if self._can_decode(s)
        )
        return needed <= self.pool.num_available

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for its next token, taken from the latest arrivals if there is no other."""
        if self._num_blocks(len(sequence.tokens)) <= len(sequence.blocks):
            return True
        while self.pool.num_available == 0:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again from its tokens; nothing is told twice."""
        assert not sequence.in_flight, "what a step under way chooses would be lost"
        self.preemptions += 1
        self.running.remove(sequence)
        self._stop_computing(sequence)
        self._free(sequence)
        sequence.num_computed = sequence.num_scheduled = sequence.num_stored = 0
        sequence.num_tabled = sequence.num_readable = 0
        sequence.num_uncached = len(sequence.tokens)
        sequence.state = State.WAITING
        sequence.on_settled = None  # fetched KV is gone: this worker computes it
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        length = min(sequence.remaining, budget)
        if sequence.wants_prompt_logprobs and sequence.num_scheduled < sequence.num_prompt - 1:
            length = min(length, self._num_reportable)
            self._num_reportable -= length
            if length == 0:
                return 0
        samples = length == sequence.remaining
        chunks.append(Chunk(sequence, sequence.num_scheduled, length, samples))
        sequence.num_scheduled += length
        sequence.in_flight += 1
        return length

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    # --- progress and end ----------------------------------------------------------------------

    def _store_full_blocks(self, sequence: Sequence) -> None:
        first, last = sequence.num_stored, sequence.num_computed // self.limits.block_size
        if first >= last:
            return
        hashes = sequence.block_hashes(last)
        parent = hashes[first - 1] if first else None
        own = sequence.blocks[first:last]
        are_read = sequence.in_flight > 0
        stored = self.pool.store(own, hashes[first:], parent, are_read=are_read)
        if stored != own:
            sequence.blocks[first:last] = stored
            sequence.num_tabled = min(sequence.num_tabled, first)
        sequence.num_stored = last
        for value in hashes[first:]:
            if self._computing.get(value) is sequence:
                del self._computing[value]

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Account for a sampled token: tell it, and finish where the request says so."""
        cached: int | None = None
        prompt: list[TokenLogprob] | None = None
        if not sequence.told_cached and sequence.num_cached is not None:
            if sequence.wants_prompt_logprobs:
                prompt, sequence.wants_prompt_logprobs = sequence.prompt_logprobs, False
            cached, sequence.told_cached = min(sequence.num_cached, sequence.num_prompt), True
        request_id, sampling = sequence.request_id, sequence.sampling
        place = len(sequence.tokens) - sequence.num_unknown
        sequence.num_unknown -= 1
        if token in sampling.stop_token_ids:
            # A later step may have been scheduled for it: that one is dropped as it completes.
            del sequence.tokens[place:]
            self._finish(
                sequence,
                EngineOutput(request_id, [], "stop", cached, token, prompt_logprobs=prompt),
            )
            return
        sequence.tokens[place] = token
        is_full = sequence.num_unknown == 0 and self._is_full(sequence)
        reason: FinishReason | None = "length" if is_full else None
        if sequence.guidance is not None:
            sequence.guidance.accept(token)
            if why := sequence.guidance.error:
                self.refuse(sequence, ErrorInfo("EngineFailed", f"guided decoding: {why}"))
                return
            if sequence.guidance.is_complete:
                reason = "stop"
        logprobs = None if logprob is None else [logprob]
        output = EngineOutput(
            request_id, [token], reason, cached, logprobs=logprobs, prompt_logprobs=prompt
        )
        if reason is not None:
            self._finish(sequence, output)
        else:
            self._outputs.append(output)

    def _finish(self, sequence: Sequence, output: EngineOutput | None) -> None:
        """Out of every collection; blocks are freed, kept for export, or freed after the step."""
        del self._live[sequence.request_id]
        was = sequence.state
        if was is State.WAITING:
            self.waiting.remove(sequence)
        elif was is State.RESERVED:
            del self.reserved[sequence.request_id]
        else:
            self.running.remove(sequence)
            self._stop_computing(sequence)
        sequence.state = State.DONE
        has_result = output is not None and output.finish_reason in ("stop", "length")
        if has_result and sequence.request.phase == "prefill":
            sequence.state = State.EXPORTED
            self.exported[sequence.request_id] = sequence
        elif sequence.in_flight:
            self._zombies.append(sequence)
        else:
            self._free(sequence)
        if output is not None:
            self._outputs.append(output)
        if was in (State.WAITING, State.RESERVED) and sequence.on_settled is not None:
            sequence.on_settled()  # does nothing if it was called before

    def _stop_computing(self, sequence: Sequence) -> None:
        for value in sequence.hashes[sequence.num_stored :]:
            if self._computing.get(value) is sequence:
                del self._computing[value]

    def _bury_zombies(self) -> None:
        for sequence in self._zombies:
            if not sequence.in_flight:
                self._free(sequence)
        self._zombies = [sequence for sequence in self._zombies if sequence.in_flight]

    def _free(self, sequence: Sequence) -> None:
        blocks, sequence.blocks = sequence.blocks, []
        self.pool.release(blocks)
