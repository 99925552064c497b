"""What a step consists of, decided without any model."""

from __future__ import annotations

from typing import Any

import pytest
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.step import Chunk
from serving.errors import Overloaded
from serving.protocol import EngineRequest, SamplingParams


def scheduler(num_blocks: int = 32, **limits: int) -> Scheduler:
    defaults = {
        "block_size": 4,
        "max_model_len": 64,
        "max_batch_size": 8,
        "max_num_batched_tokens": 16,
        "max_waiting": 8,
    }
    return Scheduler(BlockPool(num_blocks), SchedulerLimits(**{**defaults, **limits}))


class Arrivals:
    """Makes sequences with distinct tokens in order of arrival."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, length: int, tokens: list[int] | None = None, **more: Any) -> Sequence:
        self._count += 1
        ids = tokens or [self._count * 100 + i for i in range(length)]
        sampling = SamplingParams(max_tokens=more.pop("max_tokens", 50), temperature=0)
        request = EngineRequest(f"r{self._count}", ids, len(ids), sampling, **more)
        return Sequence(request, self._count, root=1, block_size=4)


@pytest.fixture
def new() -> Arrivals:
    return Arrivals()


def step(books: Scheduler) -> list[tuple[str, int, int]]:
    """Run one step with token 7 as every outcome: (request, start, length) of each chunk."""
    chunks = books.plan_step().chunks
    shape = [(c.sequence.request_id, c.start, c.length) for c in chunks]
    sampling = [c for c in chunks if c.samples]
    books.launched(chunks)
    books.complete(chunks, [7] * len(sampling), [None] * len(sampling))
    books.check_integrity()
    return shape


def test_decodes_come_first_and_prefill_fills_the_budget(new: Arrivals) -> None:
    books = scheduler()
    books.add(new(6))
    assert step(books) == [("r1", 0, 6)]
    books.add(new(20))
    books.add(new(9))
    assert step(books) == [("r1", 6, 1), ("r2", 0, 15)]
    assert step(books) == [("r1", 7, 1), ("r2", 15, 5), ("r3", 0, 9)]
    assert step(books) == [("r1", 8, 1), ("r2", 20, 1), ("r3", 9, 1)]


def test_prefill_goes_on_when_decodes_fill_the_budget(new: Arrivals) -> None:
    books = scheduler(max_num_batched_tokens=4)
    for _ in range(4):
        books.add(new(3))
    for _ in range(4):
        step(books)
    books.add(new(10))
    assert step(books)[-1] == ("r5", 0, 4)


def test_latest_arrival_is_preempted_and_resumes_where_it_was(new: Arrivals) -> None:
    books = scheduler(num_blocks=8, max_model_len=32)
    books.add(new(12))
    step(books)
    books.add(new(12))
    step(books)
    while not books.preemptions:
        step(books)
    assert [s.request_id for s in books.waiting] == ["r2"]
    told = len([o for o in books.take_outputs() if o.request_id == "r2"])
    books.abort("r1")
    victim = books.waiting[0]
    assert victim.num_output == told
    start, length = step(books)[0][1:]
    assert start + length == 12 + told
    assert victim.num_output == told + 1


def test_request_behind_the_same_prefix_waits_for_it_and_others_pass(new: Arrivals) -> None:
    books = scheduler()
    shared = list(range(1000, 1030))
    books.add(new(0, shared))
    books.add(new(0, [*shared[:22], 5, 6]))
    books.add(new(5))
    assert step(books) == [("r1", 0, 16)]
    assert step(books) == [("r1", 16, 14), ("r3", 0, 2)]
    # r1 has stored five shared blocks (20 tokens) by now.
    assert step(books) == [("r1", 30, 1), ("r3", 2, 3), ("r2", 20, 4)]


def test_aborting_a_prefill_lets_a_request_with_the_same_prefix_compute(new: Arrivals) -> None:
    books = scheduler()
    shared = list(range(1000, 1030))
    books.add(new(0, shared))
    books.add(new(0, list(shared)))
    assert step(books) == [("r1", 0, 16)]
    books.abort("r1")
    assert step(books) == [("r2", 16, 14)]


def test_abort_in_flight_keeps_blocks_until_the_step_is_over(new: Arrivals) -> None:
    books = scheduler()
    books.add(new(10))
    chunks = books.plan_step().chunks
    books.abort("r1")
    assert books.take_outputs()[-1].finish_reason == "cancelled"
    assert books.pool.num_held == 3
    books.launched(chunks)
    books.complete(chunks, [7], [None])
    assert books.pool.num_held == 0
    assert books.take_outputs() == []
    books.check_integrity()


def test_admission_leaves_running_requests_room_to_grow(new: Arrivals) -> None:
    books = scheduler(num_blocks=6, max_num_batched_tokens=64)
    books.add(new(8))
    books.add(new(16))
    assert step(books) == [("r1", 0, 8)]  # 4 blocks are free, and r1 is about to need one
    books.abort("r1")
    assert step(books) == [("r2", 0, 16)]


def test_reservation_takes_its_turn_and_starts_at_commit(new: Arrivals) -> None:
    books = scheduler(max_batch_size=1)
    settled = []
    books.add(new(5, max_tokens=2))
    reservation = new(9, phase="decode")
    reservation.on_settled = lambda: settled.append(True)
    books.add(reservation)
    step(books)
    assert not settled
    step(books)
    books.admit_reservations()
    assert settled
    assert reservation.state is State.RESERVED
    assert step(books) == []
    books.commit(reservation)
    assert step(books) == [("r2", 8, 1)]
    assert books.take_outputs()[-1].cached_tokens == 8


def test_whole_prompt_in_the_cache_still_computes_one_token(new: Arrivals) -> None:
    books = scheduler()
    tokens = list(range(1000, 1008))
    books.add(new(0, tokens, max_tokens=1))
    step(books)
    books.add(new(0, list(tokens), max_tokens=1))
    assert step(books) == [("r2", 4, 4)]


def test_queue_is_bounded(new: Arrivals) -> None:
    books = scheduler(max_waiting=1)
    books.add(new(4))
    with pytest.raises(Overloaded):
        books.add(new(4))


def queued(sequence: Sequence, until: float) -> Sequence:
    sequence.queued_until = until
    return sequence


def test_expired_requests_leave_the_queue_and_others_stay(new: Arrivals) -> None:
    books = scheduler(max_batch_size=1)
    books.add(queued(new(4), 5.0))
    step(books)
    settled = []
    reservation = queued(new(9, phase="decode", queue_s=5.0), 8.0)
    reservation.on_settled = lambda: settled.append(True)
    for sequence in (queued(new(4, queue_s=5.0), 5.0), new(4), reservation):
        books.add(sequence)
    books.take_outputs()
    assert books.expire(4.9) == 5.0
    assert books.take_outputs() == []
    assert books.expire(5.0) == 8.0
    [output] = books.take_outputs()
    assert output.request_id == "r3"
    assert output.error is not None
    assert output.error.kind == "QueuedTooLong"
    assert "5 s (`deadlines.queue_s`)" in output.error.message
    assert not settled
    assert books.expire(9.0) is None
    assert settled, "whoever waits for the reservation is told"
    assert [s.request_id for s in books.waiting] == ["r4"]
    assert books.load().num_waiting == 1
    books.check_integrity()


def test_preempted_request_is_not_in_the_queue_for_the_first_time(new: Arrivals) -> None:
    books = scheduler(num_blocks=8, max_model_len=32)
    for _ in range(2):
        books.add(queued(new(12), 5.0))
        step(books)
    while not books.preemptions:
        step(books)
    assert [s.request_id for s in books.waiting] == ["r2"]
    assert books.expire(100.0) is None
    assert [s.request_id for s in books.waiting] == ["r2"]


def test_failed_step_stores_nothing(new: Arrivals) -> None:
    books = scheduler()
    books.add(new(8))
    chunks: list[Chunk] = books.plan_step().chunks
    books.fail(chunks, "boom")
    assert books.take_outputs()[-1].finish_reason == "error"
    assert books.pool.stored_hashes() == set()
    assert books.pool.num_held == 0
    books.check_integrity()


def test_cached_tokens_do_not_count_as_queued(new: Arrivals) -> None:
    """Routers send a prompt where it costs least: a cached one waiting is no long queue."""
    books = scheduler(max_batch_size=1)
    books.add(new(9, tokens=list(range(9)), max_tokens=2))
    step(books)
    books.add(new(9, tokens=list(range(9))))
    assert books.load().queued_tokens == 1
    books.add(new(7))
    assert books.load().queued_tokens == 8
