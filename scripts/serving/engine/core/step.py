"""What the next step computes: every running decode, then prefill chunks, then new admissions.

Knows the rules of one step: the token budget, chunked prefill, room for decodes, preemption. Does
not know how a request begins (`admission`) or ends (`scheduler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serving.engine.core.admission import Admission, SchedulerLimits
from serving.engine.core.host_tier import Copies
from serving.engine.core.sequence import Sequence, State

MAX_REPORTED_TOKENS = 256
"""Prompt tokens in a step whose log-probabilities are reported: each needs a row of logits."""


@dataclass(frozen=True)
class Chunk:
    """The part of a step that belongs to one sequence: compute `tokens[start : start + length]`.

    `samples` says that these are its last tokens, so that the next one is to be chosen.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def num_reported(self) -> int:
        """How many of its leading tokens precede one whose log-probability is wanted."""
        if not self.sequence.wants_prompt_logprobs:
            return 0
        return max(0, min(self.length, self.sequence.num_prompt - 1 - self.start))


class StepPlan(NamedTuple):
    """One step: make the `copies` between the tiers, then compute the `chunks`. Either may be empty."""

    chunks: list[Chunk]
    copies: Copies

    def __bool__(self) -> bool:
        return bool(self.chunks or self.copies)


class StepPlanner:
    """Chooses the chunks of each step among the admitted sequences, and admits more."""

    def __init__(self, admission: Admission, limits: SchedulerLimits) -> None:
        self._admission, self._limits = admission, limits
        self._blocks, self._running = admission.blocks, admission.running
        self._reportable = 0  # tokens that the step being planned may still report
        self.preemptions = 0

    def plan(self, *, is_ahead: bool) -> list[Chunk]:
        """The chunks of the next step; see `Scheduler.plan_step`."""
        if is_ahead and not self._has_room_for_decodes():
            return []
        self._reportable = MAX_REPORTED_TOKENS
        chunks = self._plan_decodes()
        # Prefill never starves, even where decodes alone fill the budget.
        budget = max(self._limits.block_size, self._limits.max_num_batched_tokens - len(chunks))
        for sequence in self._running:
            if budget > 0 and sequence.remaining > 1:
                budget -= self._add_chunk(chunks, sequence, budget)
        if budget > 0:
            for sequence in self._admission.admit_waiting():
                if sequence.state is State.RUNNING:
                    budget -= self._add_chunk(chunks, sequence, budget)
                if budget <= 0:
                    break
        return chunks

    def is_full(self, sequence: Sequence) -> bool:
        """Whether its last token, known or not, ends it."""
        return (
            sequence.num_output >= sequence.sampling.max_tokens
            or len(sequence.tokens) >= self._limits.max_model_len
            or sequence.request.phase == "prefill"
        )

    def _plan_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self._running):
            # An earlier sequence of this loop may have preempted this one.
            can_decode = sequence.state is State.RUNNING and self._can_decode(sequence)
            if can_decode and self._make_room(sequence):
                self._add_chunk(chunks, sequence, 1)
        return chunks

    def _can_decode(self, sequence: Sequence) -> bool:
        if sequence.remaining > 1:
            return False  # in prefill
        if sequence.num_unknown == 0:
            return True
        return not (self.is_full(sequence) or sequence.needs_token_values)

    def _has_room_for_decodes(self) -> bool:
        needed = sum(
            self._blocks.needs_another(sequence)
            for sequence in self._running
            if self._can_decode(sequence)
        )
        return needed <= self._blocks.pool.num_available

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for its next token, taken from the latest arrivals when no block is available.

        False when the sequence itself was the latest arrival, and was preempted.
        """
        if not self._blocks.needs_another(sequence):
            return True
        while self._blocks.pool.num_available == 0:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._blocks.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue. Its tokens are computed again; no output is repeated."""
        assert not sequence.in_flight, "what a step under way chooses would be lost"
        self.preemptions += 1
        self._admission.remove(sequence)
        self._blocks.free(sequence)
        sequence.num_computed = sequence.num_scheduled = sequence.num_stored = 0
        sequence.num_tabled = sequence.num_readable = 0
        sequence.num_uncached = len(sequence.tokens)
        sequence.on_settled = None  # fetched KV is gone: this worker computes it
        self._admission.put_back(sequence)

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Add up to `budget` tokens of a sequence; returns how many."""
        length = min(sequence.remaining, budget)
        if sequence.wants_prompt_logprobs and sequence.num_scheduled < sequence.num_prompt - 1:
            length = min(length, self._reportable)
            self._reportable -= length
            if length == 0:
                return 0
        samples = length == sequence.remaining
        chunks.append(Chunk(sequence, sequence.num_scheduled, length, samples))
        sequence.num_scheduled += length
        sequence.in_flight += 1
        return length
