"""Answers of the adapter, its KV events and its load."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from serving import block_hash
from serving.errors import InvalidRequest, Overloaded
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import generate, greedy, random_prompts, request
from unit.engine.trtllm_rig import (
    decode_request,
    num_removed,
    running,
    settled,
    until,
)


@pytest.mark.usefixtures("newest")
async def test_stop_tokens_end_a_request_and_are_not_part_of_its_output(folder: Path) -> None:
    prompt = random_prompts([20])[0]
    expected = generate(folder, prompt, 12)
    place = next(n for n in range(2, 12) if expected[n] not in expected[:n])
    async with running(folder) as (engine, sink):
        for name, stops in (("end", (expected[place],)), ("stop", (255, expected[place]))):
            engine.submit(request(name, prompt, greedy(12, stop_token_ids=stops)))
            await sink.finished(name)
            assert sink.tokens[name] == expected[:place]
            last = sink.last[name]
            assert (last.finish_reason, last.stop_token_id) == ("stop", expected[place])


@pytest.mark.usefixtures("newest")
async def test_stop_on_the_very_last_token_is_a_stop(folder: Path) -> None:
    prompt = random_prompts([20])[0]
    expected = generate(folder, prompt, 12)
    place = next(n for n in range(2, 12) if expected[n] not in expected[:n])
    async with running(folder) as (engine, sink):
        sampling = greedy(place + 1, stop_token_ids=(255, expected[place]))
        engine.submit(request("r", prompt, sampling))
        await sink.finished("r")
        assert sink.last["r"].finish_reason == "stop"
        assert sink.tokens["r"] == expected[:place]


@pytest.mark.usefixtures("newest")
async def test_logprobs_go_with_their_tokens_through_a_handover(folder: Path) -> None:
    prompt = random_prompts([40])[0]
    sampling = greedy(6, logprobs=2)
    async with running(folder) as (engine, sink):
        engine.submit(request("r", prompt, sampling))
        await sink.finished("r")
    expected = sink.logprobs["r"]
    assert [row.token_id for row in expected] == sink.tokens["r"]
    assert all(len(row.top) == 2 and row.top[0][1] >= row.top[1][1] for row in expected)
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode") as (target, decode_sink),
    ):
        asked = request("r", prompt, sampling, phase="prefill")
        source.submit(asked)
        await prefill_sink.finished("r")
        target.submit(decode_request(asked, prefill_sink.last["r"]))
        await decode_sink.finished("r")
    told = prefill_sink.logprobs["r"] + decode_sink.logprobs["r"]
    assert [row.token_id for row in told] == [row.token_id for row in expected]
    assert [row.logprob for row in told] == pytest.approx([r.logprob for r in expected], abs=1e-4)


@pytest.mark.usefixtures("newest")
async def test_seeds_reproduce_and_unseeded_requests_differ(folder: Path) -> None:
    prompt = random_prompts([20])[0]
    async with running(folder) as (engine, sink):
        sampling = msgspec.structs.replace(greedy(16), temperature=2.0)
        for name, seed in (("a", 7), ("b", 7), ("c", None), ("d", None)):
            seeded = msgspec.structs.replace(sampling, seed=seed)
            engine.submit(request(name, prompt, seeded))
        await sink.finished("a", "b", "c", "d")
    assert sink.tokens["a"] == sink.tokens["b"]
    assert sink.tokens["c"] != sink.tokens["d"]


@pytest.mark.usefixtures("newest")
async def test_continued_request_goes_on_where_it_stopped(folder: Path) -> None:
    prompt = random_prompts([20])[0]
    expected = generate(folder, prompt, 12)
    async with running(folder) as (engine, sink):
        continued = request("r", prompt + expected[:5], greedy(12), num_prompt_tokens=len(prompt))
        engine.submit(continued)
        await sink.finished("r")
    assert sink.tokens["r"] == expected[5:]
    assert sink.last["r"].finish_reason == "length"


@pytest.mark.usefixtures("newest")
async def test_context_length_ends_a_request(folder: Path) -> None:
    prompt = random_prompts([250])[0]
    async with running(folder) as (engine, sink):
        engine.submit(request("r", prompt, greedy(50)))
        await sink.finished("r")
    assert len(sink.tokens["r"]) == 6
    assert sink.last["r"].finish_reason == "length"


@pytest.mark.usefixtures("newest")
async def test_requests_that_can_never_run_are_refused(folder: Path) -> None:
    async with running(folder, max_batch_size=1, max_waiting=1) as (engine, sink):
        for prompt, code in (
            ([], "empty_prompt"),
            ([1] * 256, "context_length_exceeded"),
            ([1, 256], "invalid_token"),
            ([1, -1], "invalid_token"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                engine.submit(request("bad", prompt, greedy(4)))
            assert caught.value.code == code
        with pytest.raises(InvalidRequest, match="leaves nothing"):
            engine.submit(request("bad", [1, 2, 3], greedy(1), num_prompt_tokens=2))
        engine.submit(request("a", [1, 2], greedy(100)))
        engine.submit(request("b", [1, 2], greedy(4)))
        with pytest.raises(InvalidRequest, match="already running"):
            engine.submit(request("a", [1, 2], greedy(4)))
        with pytest.raises(Overloaded):
            engine.submit(request("c", [1, 2], greedy(4)))
        await sink.finished("a", "b")


# --- KV events and load ----------------------------------------------------------------------------


@pytest.mark.usefixtures("newest")
async def test_events_name_blocks_by_our_hashes_and_hits_follow(folder: Path) -> None:
    prompt = random_prompts([70])[0]
    chain = block_hash.chain(prompt, rig.BLOCK_SIZE, block_hash.root_hash("tiny"))
    async with running(folder) as (engine, sink):
        engine.submit(request("cold", prompt, greedy(4)))
        await sink.finished("cold")
        assert sink.cached["cold"] == 0
        await until(lambda: sink.stored >= set(chain))
        engine.submit(request("warm", prompt, greedy(4)))
        await sink.finished("warm")
        assert sink.cached["warm"] == 64
        # What versions are told by that do not say it with the answer.
        assert engine._num_cached(prompt) == 64
        assert engine._num_cached(prompt[:64]) == 48  # the last token is computed in any case
        assert engine._num_cached(prompt[1:]) == 0
        assert sink.tokens["warm"] == sink.tokens["cold"]


@pytest.mark.usefixtures("newest")
async def test_evicted_blocks_are_removed(folder: Path) -> None:
    prompts = random_prompts([200] * 24)
    async with running(folder) as (engine, sink):
        for n, prompt in enumerate(prompts):
            engine.submit(request(f"r{n}", prompt, greedy(2)))
        await sink.finished(*(f"r{n}" for n in range(len(prompts))))
        # 24 prompts of 12 full blocks do not fit into 256.
        await until(lambda: num_removed(sink) >= 32)
        assert len(sink.stored) <= engine.spec.num_blocks


@pytest.mark.usefixtures("newest")
async def test_load_counts_requests_and_blocks(folder: Path) -> None:
    async with running(folder, max_batch_size=2) as (engine, sink):
        for n, prompt in enumerate(random_prompts([30] * 4)):
            engine.submit(request(f"r{n}", prompt, greedy(60)))
        load = engine.load()
        assert (load.num_running, load.num_waiting, load.queued_tokens) == (2, 2, 120)
        await sink.finished(*(f"r{n}" for n in range(4)))
        await settled(engine)
        load = engine.load()
        assert (load.num_running, load.num_waiting, load.queued_tokens) == (0, 0, 0)
        assert load.num_blocks == 256
