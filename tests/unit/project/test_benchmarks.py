"""How benchmarks read clocks and judge results: errors here would go unnoticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from benchmarks.disagg import Measurement, best_at_equal_ttft, verdicts
from benchmarks.engines.driven_engine import Run
from benchmarks.engines.dummy_engine import make_engine
from benchmarks.engines.model_costs import ModelCosts
from benchmarks.load.http_load import Shape, load
from benchmarks.load.mixed_load import Load
from benchmarks.load.streaming_client import Completion
from benchmarks.routing_live import Pace, Prompts
from serving.block_hash import chain
from serving.config import MockConfig
from serving.engine.core.speed import Work, WorkerSpeed
from serving.protocol import EngineOutput
from serving.simulate.trace import Trace, TraceRequest

LOAD = Load(
    streams=2,
    stream_prompt=1,
    stream_output=1,
    prompt=1,
    output=1,
    rate=2.0,
    vocab_size=9,
    warm_up_s=1,
    measure_s=1,
    seed=0,
    temperature=0,
)


def measurement(setup: str, itl_p99: float, ttft_p90: float, when: int = 0) -> Measurement:
    values = {"itl_p99": itl_p99, "ttft_p90": ttft_p90, "output_tokens_per_s": 1.0}
    return Measurement(setup, "machine", LOAD, values, {}, when)


def test_best_aggregated_setup_has_the_lowest_itl_at_equal_ttft() -> None:
    ours = measurement("disagg", 10, 100)
    others = [
        measurement("agg-256", 12, 300),
        measurement("agg-1024", 40, 104),
        measurement("agg-8192", 90, 60),
    ]
    best, how = best_at_equal_ttft(ours, others)
    assert (best.setup, "of 2" in how) == ("agg-1024", True)
    nearest, how = best_at_equal_ttft(measurement("disagg", 10, 50), others)
    assert (nearest.setup, "nearest" in how) == ("agg-8192", True)


def test_verdict_compares_the_newest_measurements_under_one_load() -> None:
    found = verdicts(
        [
            measurement("agg-default", 999, 50, when=1),
            measurement("disagg", 10, 50, when=2),
            measurement("agg-default", 40, 50, when=3),
        ]
    )
    assert [row["ratio"] for row in found] == [0.25, 0.25]
    assert {row["name"].split(",")[0] for row in found} == {
        "itl p99 vs default",
        "itl p99 vs best aggregated at equal ttft p90",
    }


async def test_client_counts_events_however_the_bytes_are_cut() -> None:
    event = b'e4\r\ndata: {"id":"x","choices":[{"index":0,"text":"\\n\\n"}],"usage":null}\n\n\r\n'
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    stream = b"HTTP/1.1 200 OK\r\ncontent-type: x\r\n\r\n" + event * 3 + usage + b"data: [DONE]\n\n"
    for size in (1, 7, len(stream)):
        completion = Completion(b"")
        for start in range(0, len(stream), size):
            completion.data_received(stream[start : start + size])
        completion.connection_lost(None)
        assert (len(completion.times), completion.num_tokens, completion.error) == (3, 3, "")
        assert completion.num_cached == 4


async def test_refused_request_says_why() -> None:
    completion = Completion(b"")
    completion.data_received(b'HTTP/1.1 429 Busy\r\n\r\n{"error":{"message":"too many"}}')
    completion.connection_lost(None)
    assert completion.ended.is_set()
    assert "too many" in completion.error


async def test_steps_are_steady_from_the_second_token_of_all_to_the_first_end() -> None:
    now = 0.0
    run = Run(["a", "b"], clock=lambda: now)

    def deliver(after: float, *outputs: tuple[str, int, str | None]) -> None:
        nonlocal now
        now += after
        run.receive([EngineOutput(name, [1] * n, end) for name, n, end in outputs])  # type: ignore[arg-type]

    deliver(5, ("a", 1, None))
    deliver(5, ("a", 1, None), ("b", 1, None))
    deliver(1, ("a", 1, None), ("b", 1, None))
    deliver(4, ("a", 1, None), ("a", 1, None), ("b", 1, None), ("b", 1, None))  # two steps at once
    deliver(3, ("a", 1, "length"), ("b", 1, None))
    deliver(9, ("b", 1, "length"))
    assert run.steady_steps() == pytest.approx([1, 2, 2, 3])
    assert (run.ttft_s, run.wall_s) == pytest.approx((10, 27))
    await asyncio.wait_for(run.done(), 1)


def test_costs_of_the_8b_shape(tmp_path: Path) -> None:
    make_engine(tmp_path / "made", device="cpu", dtype="bfloat16")
    costs: Any = ModelCosts(tmp_path / "made" / "engine", "bfloat16")
    assert costs.num_weights == 8_030_261_248
    weights, kv = costs.read_bytes(16, 2048)
    assert weights == 2 * (8_030_261_248 - 128_256 * 4096)
    assert kv == 16 * 2048 * 131_072
    # Linear layers alone: 6.98 billion weights; attention of 8k adds 15 %.
    assert costs.prefill_flops(8192) == pytest.approx(8192 * 2 * 6.98e9 + 17.6e12, rel=0.01)


async def test_load_counts_events_of_answers_that_arrive_in_any_pieces() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    event = b'30\r\ndata: {"choices":[{"delta":{"content":"x"}}]}\n\n\r\n'
    streamed = head + event * 3 + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    for answer, num_events, size in (
        (streamed, 3, 1),
        (streamed, 3, 50),
        (whole, 0, 1),
        (whole, 0, 99),
    ):

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer=answer, size=size
        ) -> None:  # type: ignore[no-untyped-def]
            try:
                while b"content-length: " in await reader.readuntil(b"\r\n\r\n"):
                    await reader.readuntil(b"false}")
                    for start in range(0, len(answer), size):
                        writer.write(answer[start : start + size])
                        await writer.drain()
                        await asyncio.sleep(0)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass  # the client has what it wanted
            finally:
                writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            result = await load(port, "m", Shape(3, stream=False), connections=2, num_requests=6)
        await asyncio.sleep(0.05)  # transports of both ends are closed by then
        assert (result.num_requests, result.num_events) == (6, 6 * num_events)
        assert len(result.first_s) == 6


def trace_of(*requests: tuple[float, int, list[int]]) -> Trace:
    return Trace([TraceRequest(at, tokens, 9, hashes) for at, tokens, hashes in requests], 512)


def test_live_slice_has_the_chosen_length_and_keeps_shared_blocks() -> None:
    trace = trace_of((0, 1100, [5, 6]), (9.5, 512, [5]), (10, 3, []))
    part = Pace(first_s=10, speedup=4, shrink=4).of(trace)
    assert [each.arrival_s for each in part.requests] == [0, 9.5 / 4]
    assert [each.prompt_tokens for each in part.requests] == [256 + 76 // 4, 128]
    assert [each.block_hashes for each in part.requests] == [[5, 6], [5]]
    assert part.block_size == 128
    assert Pace(first_s=99, speedup=1).of(trace) == trace


def test_prompt_is_never_empty() -> None:
    (only,) = Pace(first_s=9, speedup=1, shrink=4).of(trace_of((0, 3, []))).requests
    assert len(Prompts(0).token_ids(only, 0, 128)) == only.prompt_tokens == 1


@pytest.mark.parametrize("shrink", [1, 4])
def test_prompts_share_exactly_the_blocks_of_the_trace(shrink: int) -> None:
    trace = trace_of((0, 1400, [5, 6]), (1, 1400, [5, 7]), (2, 1400, [5, 6]))
    part = Pace(first_s=9, speedup=1, shrink=shrink).of(trace)

    def hashes(salt: int) -> list[list[int]]:
        prompts, size = Prompts(salt), part.block_size
        ids = [prompts.token_ids(each, n, size) for n, each in enumerate(part.requests)]
        assert [len(each) for each in ids] == [each.prompt_tokens for each in part.requests]
        return [chain(each, size // 4, 0) for each in ids]  # finer: so the rest has blocks too

    one, other, again = hashes(0)
    assert again[:8] == one[:8]
    assert one[:4] == other[:4]
    assert len(one) > 8
    shared = [set(one) & set(other), set(one) & set(again)]
    assert [len(each) for each in shared] == [4, 8]
    assert not set(one) & {each for prompt in hashes(1) for each in prompt}


@pytest.mark.parametrize("shrink", [1, 4])
def test_live_engine_computes_a_block_of_the_trace_as_fast_as_the_simulated_one(
    shrink: int,
) -> None:
    pace = Pace(first_s=9, speedup=3, shrink=shrink)
    sections, speed = pace.engine_sections(), pace.engine_speed()
    timing = msgspec.convert(sections["mock"], MockConfig)
    chunk = sections["engine"]["max_num_batched_tokens"]
    mock = WorkerSpeed.from_mock(timing, kv_token_bytes=1)
    decodes = Work(num_decodes=5)
    assert mock.step_time_s(decodes) == pytest.approx(speed.step_time_s(decodes))
    took_s = mock.step_time_s(Work(prefill_tokens=chunk, num_decodes=5))
    assert chunk / took_s == pytest.approx(speed.prefill_tokens_per_s)
    assert speed.prefill_tokens_per_s * shrink == 3 * 20_000
