"""Which waiting request runs next: the queue, the batch, and the rules between them.

A request is admitted in order of arrival, when the batch and the pool have room for it.
Requests whose grammar is being compiled, or whose prefix another request computes right now, let
others pass. Used by the scheduler of the engines and by the simulator.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from serving.config import EngineConfig
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.sequence_blocks import SequenceBlocks
from serving.errors import Overloaded


@dataclass(frozen=True)
class SchedulerLimits:
    """See `config.EngineConfig` for meanings; lengths and sizes are in tokens."""

    block_size: int
    max_model_len: int
    max_batch_size: int
    max_num_batched_tokens: int
    max_waiting: int

    @classmethod
    def from_config(
        cls, config: EngineConfig, step_tokens: int, max_model_len: int
    ) -> SchedulerLimits:
        """`step_tokens` and `max_model_len` are the values of a worker, which are never `auto`."""
        return cls(
            config.block_size,
            max_model_len,
            config.max_batch_size,
            step_tokens,
            config.max_waiting,
        )


class Admission:
    """The sequences that wait, run, or hold reserved blocks; each is in one collection.

    A running sequence grows block by block, and an admission leaves one block for each that runs.
    With `holds_answers` each sequence gets room for its whole answer at once, so none grows.
    """

    def __init__(
        self, blocks: SequenceBlocks, limits: SchedulerLimits, *, holds_answers: bool = False
    ) -> None:
        self.blocks = blocks
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.reserved: dict[str, Sequence] = {}
        self.queued_tokens = 0
        """Tokens that the queue will have to compute."""
        self._limits, self._holds_answers = limits, holds_answers

    # --- the queue -----------------------------------------------------------------------------

    def enqueue(self, sequence: Sequence) -> None:
        """A new request. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self._limits.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting in this worker")
        sequence.num_uncached = self.blocks.num_uncached(sequence)
        self.queued_tokens += sequence.num_uncached
        self.waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence waits again, in order of arrival."""
        sequence.state = State.WAITING
        self.queued_tokens += sequence.num_uncached
        bisect.insort(self.waiting, sequence, key=lambda s: s.arrival)

    def expired(self, now: float) -> list[Sequence]:
        """Requests whose time in the queue is over at loop time `now`."""
        return [s for s in self.waiting if s.queued_until is not None and now >= s.queued_until]

    def next_expiry(self) -> float | None:
        """Loop time at which the next request will have waited for too long."""
        return min(
            (s.queued_until for s in self.waiting if s.queued_until is not None), default=None
        )

    # --- into the batch ------------------------------------------------------------------------

    def admit_waiting(self) -> Iterator[Sequence]:
        """Admit one waiting request after the other for as long as the caller iterates.

        Ends at the first request that finds no room. An admitted reservation is RESERVED, any
        other request RUNNING.
        """
        for sequence in list(self.waiting):
            if not sequence.is_ready or self.blocks.is_being_computed(sequence):
                continue
            if not self.admit(sequence):
                return
            yield sequence

    def admit_reservations(self) -> None:
        """Admit reservations at the head of the queue without waiting for the next step."""
        while self.waiting and self.waiting[0].is_reservation:
            if not self.admit(self.waiting[0]):
                return

    def admit(self, sequence: Sequence) -> bool:
        """Give a waiting request its blocks. False when there is no room for it."""
        if len(self.running) + len(self.reserved) >= self._limits.max_batch_size:
            return False
        # Room for each running sequence to grow, so that an admission does not preempt at once.
        num_spare = 0 if self._holds_answers else len(self.running)
        if not self.blocks.claim(sequence, self._num_tokens(sequence), num_spare):
            return False
        self._leave_queue(sequence)
        sequence.queued_until = None
        if sequence.on_settled is not None:
            sequence.state = State.RESERVED
            self.reserved[sequence.request_id] = sequence
            # A transfer writes at any time, so the blocks must not be read by copies any more.
            self.blocks.pool.host.when_copied(sequence.on_settled)
        else:
            self._run(sequence)
        return True

    def commit(self, sequence: Sequence) -> None:
        """A reservation has its KV: it runs, with all tokens but the last one computed."""
        assert sequence.state is State.RESERVED
        del self.reserved[sequence.request_id]
        sequence.num_computed = len(sequence.request.token_ids) - 1
        sequence.num_scheduled = sequence.num_cached = sequence.num_computed
        self.blocks.store_computed(sequence)
        self._run(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its collection. Its blocks and its state stay as they are."""
        if sequence.state is State.WAITING:
            self._leave_queue(sequence)
        elif sequence.state is State.RESERVED:
            del self.reserved[sequence.request_id]
        else:
            self.running.remove(sequence)
            self.blocks.stop_computing(sequence)

    def check_integrity(self) -> None:
        """For tests: states and collections agree."""
        for state, members in (
            (State.WAITING, self.waiting),
            (State.RUNNING, self.running),
            (State.RESERVED, list(self.reserved.values())),
        ):
            assert all(s.state is state for s in members), f"a sequence is wrongly {state.value}"
        for members in (self.waiting, self.running):
            arrivals = [sequence.arrival for sequence in members]
            assert arrivals == sorted(arrivals), "a collection is out of order"
        assert all(not s.blocks for s in self.waiting), "a waiting request holds blocks"
        queued = sum(sequence.num_uncached for sequence in self.waiting)
        assert self.queued_tokens == queued, "queued tokens do not add up"
        self.blocks.check_integrity(self.running)

    def _num_tokens(self, sequence: Sequence) -> int:
        """Tokens to hold room for. A reservation needs none for its last token, which comes along."""
        num_tokens = len(sequence.tokens) - sequence.is_reservation
        if not self._holds_answers:
            return num_tokens
        if sequence.request.phase != "prefill":
            num_tokens = sequence.num_prompt + sequence.sampling.max_tokens
        return min(num_tokens, self._limits.max_model_len)

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.queued_tokens -= sequence.num_uncached

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)
