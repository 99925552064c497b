"""How long steps and transfers take, from the configuration of the mock engine and of a plan."""

import pytest
from serving.config import MockConfig, PlanConfig
from serving.engine.core.sequence import Sequence
from serving.engine.core.speed import Work, WorkerSpeed, work_of
from serving.engine.core.step import Chunk
from serving.protocol import EngineRequest, SamplingParams

TOKEN_BYTES = 10
SPEED = WorkerSpeed.from_mock(
    MockConfig(
        prefill_tokens_per_s=1000,
        prefill_pair_s=1e-6,
        step_s=0.01,
        step_sequence_s=0.001,
        step_context_token_s=1e-5,
        transfer_bytes_per_s=1e6,
        transfer_latency_s=0.5,
        host_bytes_per_s=1e6,
    ),
    TOKEN_BYTES,
)


def test_step_time_is_the_sum_of_its_parts() -> None:
    work = Work(prefill_tokens=100, prefill_pairs=2000, num_decodes=4, context_tokens=300)
    assert SPEED.step_time_s(work) == pytest.approx(0.01 + 0.1 + 0.002 + 0.004 + 0.003)
    assert SPEED.step_time_s(Work(num_decodes=1)) == pytest.approx(0.011)
    assert SPEED.step_time_s(Work(), host_tokens=100) == pytest.approx(0.001)
    assert SPEED.step_time_s(Work()) == 0.0


def test_transfer_time_is_latency_and_tokens() -> None:
    assert SPEED.transfer_time_s(25_000) == pytest.approx(0.75)
    assert SPEED.transfer_time_s(0) == 0.0


def test_speedup_divides_all_times() -> None:
    mock = MockConfig(step_s=0.01, transfer_bytes_per_s=1e6, speedup=10)
    fast = WorkerSpeed.from_mock(mock, TOKEN_BYTES)
    assert fast.step_time_s(Work(num_decodes=10)) == pytest.approx(0.0011)
    assert fast.transfer_time_s(100) == pytest.approx(1e-4)


def test_zero_rates_and_zero_delay_take_exactly_nothing() -> None:
    work = Work(10**6, 10**9, 100, 10**6)
    free = MockConfig(
        prefill_tokens_per_s=0,
        step_s=0,
        step_sequence_s=0,
        transfer_bytes_per_s=0,
        host_bytes_per_s=0,
    )
    for mock in (free, MockConfig(zero_delay=True, step_s=9, transfer_latency_s=9)):
        speed = WorkerSpeed.from_mock(mock, TOKEN_BYTES)
        assert speed.step_time_s(work, 10**9) == 0.0
        assert speed.transfer_time_s(10**9) == 0.0


def test_a_plan_states_the_step_of_a_single_sequence() -> None:
    plan = PlanConfig(prefill_tokens_per_s=1000, step_s=0.02, step_per_sequence_s=0.001)
    speed = WorkerSpeed.from_plan(plan)
    assert speed.step_time_s(Work(num_decodes=1)) == pytest.approx(0.02)
    assert speed.step_time_s(Work(num_decodes=11)) == pytest.approx(0.03)
    assert speed.prefill_time_s(500) == pytest.approx(0.5)


def test_work_distinguishes_prefill_and_decode() -> None:
    sequence = Sequence(EngineRequest("r", [5] * 20, 20, SamplingParams(max_tokens=9)), 0, 0, 8)
    last_of_prompt = Chunk(sequence, 19, 1, samples=True)
    chunks = [Chunk(sequence, 4, 3, samples=False), last_of_prompt, Chunk(sequence, 20, 1, True)]
    assert work_of(chunks) == Work(4, (4 + 5 + 6) + 19, 1, 20)
