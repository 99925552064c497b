"""A simulated worker takes the time its figures say, and keeps its blocks in order."""

import pytest
from serving.engine.core.speed import WorkerSpeed
from serving.load_report import LoadReport
from serving.protocol import BlocksRemoved, BlocksStored, KvEventBatch, ModelCard, Phase
from serving.simulate.clock import Clock
from serving.simulate.trace import TraceRequest
from serving.simulate.worker import SimulatedWorker, WorkerRequest

BLOCK = 100
CARD = ModelCard("m", "", 1 << 30, BLOCK, "salt", "", 0)
SPEED = WorkerSpeed(
    prefill_tokens_per_s=1000, step_s=0.008, step_sequence_s=0.002, transfer_tokens_per_s=10_000
)


class Bench:
    def __init__(self, num_blocks: int = 1000) -> None:
        self.clock = Clock()
        self.batches: list[KvEventBatch] = []
        self.reports: list[LoadReport] = []
        self.worker = SimulatedWorker(
            self.clock,
            "w0",
            "agg",
            CARD,
            num_blocks,
            SPEED,
            publish_kv=self.batches.append,
            publish_load=self.reports.append,
        )
        self.times: list[tuple[float, float]] = []
        self.requests: list[WorkerRequest] = []

    def send(
        self,
        at_s: float,
        prompt: int,
        completion: int = 1,
        *,
        first_hash: int = 1,
        phase: Phase = "agg",
    ) -> None:
        """One request; `times` gets its first token and its end."""
        hashes = [first_hash + n for n in range(prompt // BLOCK)]
        request = TraceRequest(at_s, prompt, completion, hashes)
        times: list[float] = []

        def prefilled() -> None:
            times.append(self.clock.now_s)

        def done() -> None:
            self.times.append((times[0], self.clock.now_s))

        name = f"r{len(self.requests)}"
        sent = WorkerRequest(name, request, phase, on_prefilled=prefilled, on_done=done)
        self.requests.append(sent)
        self.clock.at(at_s, lambda: self.worker.submit(sent))

    def run(self) -> None:
        self.clock.run(1000.0)
        self.worker.stop()
        self.clock.run()
        self.worker.check_integrity()


def close(*times: float) -> tuple[float, ...]:
    return pytest.approx(times, abs=1e-6)  # type: ignore[return-value]


def test_a_prompt_takes_its_tokens_and_an_answer_its_steps() -> None:
    bench = Bench()
    bench.send(1.0, 500, 11)
    bench.run()
    assert bench.times == [close(1.5, 1.6)]


def test_prompts_wait_for_each_other_in_order() -> None:
    bench = Bench()
    bench.send(0.0, 500, first_hash=1)
    bench.send(0.1, 300, first_hash=1000)
    bench.run()
    assert bench.times == [close(0.5, 0.5), close(0.8, 0.8)]


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    bench = Bench()
    bench.send(0.0, 500)
    bench.send(1.0, 800)
    bench.send(3.0, 800)
    bench.run()
    assert [each.cached_tokens for each in bench.requests] == [0, 500, 700]
    assert tuple(first for first, _ in bench.times) == close(0.5, 1.3, 3.1)
    stored = [event for batch in bench.batches for event in batch.events]
    assert stored == [BlocksStored(None, [1, 2, 3, 4, 5]), BlocksStored(5, [6, 7, 8])]
    assert [batch.seq for batch in bench.batches] == [1, 2]


def test_sequences_that_decode_together_slow_each_other() -> None:
    bench = Bench()
    bench.send(0.0, 100, 101, first_hash=1)  # alone until 0.2: 10 steps; then 12 ms each
    bench.send(0.1, 100, 11, first_hash=100)
    bench.run()
    assert bench.times == [close(0.2, 0.2 + 10 * 0.012), close(0.1, 0.1 + 0.1 + 0.12 + 0.8)]


def test_a_request_without_room_waits_until_blocks_are_free() -> None:
    bench = Bench(num_blocks=10)
    bench.send(0.0, 700, 101, first_hash=1)
    bench.send(0.1, 500, 1, first_hash=100)
    bench.run()
    assert bench.times[0] == close(0.7, 1.7)
    assert bench.times[1] == close(2.2, 2.2)
    assert max(report.num_waiting for report in bench.reports) == 1


def test_a_prompt_larger_than_the_pool_takes_all_of_it() -> None:
    bench = Bench(num_blocks=10)
    bench.send(0.0, 3000, 11)
    bench.run()
    assert bench.times == [close(3.0, 3.1)]


def test_held_blocks_are_not_evicted_and_cached_ones_are_leaves_first() -> None:
    bench = Bench(num_blocks=10)
    bench.send(0.0, 600, first_hash=1)
    bench.send(1.0, 700, first_hash=100)
    bench.send(3.0, 600, first_hash=1)
    bench.run()
    assert bench.batches[1].events[0] == BlocksRemoved([6, 5, 4, 3])
    assert bench.requests[2].cached_tokens == 200


def test_a_fetched_prompt_takes_the_time_of_its_transfer_and_prefills_nothing() -> None:
    bench = Bench()
    bench.send(0.0, 1000, 11, phase="decode")
    bench.run()
    arrived = SPEED.transfer_latency_s + 0.1
    assert bench.times == [close(arrived, arrived + 0.1)]
    assert bench.worker.busy_s == 0.0


def test_reports_count_the_rest_of_the_queue_and_never_stop() -> None:
    bench = Bench()
    bench.send(0.0, 4000, first_hash=1)
    bench.send(0.0, 1000, first_hash=1000)
    bench.run()
    early = [report.queued_tokens for report in bench.reports if report.num_waiting]
    assert early[0] == 5000
    assert sorted(early, reverse=True) == early
    assert bench.reports[-1].queued_tokens == bench.reports[-1].num_running == 0
    assert len(bench.reports) > 900
