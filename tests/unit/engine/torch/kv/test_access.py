"""Blocks leave one torch engine and enter another: prefill here, decode there."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.engine.torch.engine import TorchEngine
from serving.errors import EngineFailed, InvalidRequest
from serving.protocol import BlocksStored, EngineRequest, SamplingParams
from unit.engine.torch_rig import (
    Sink,
    generate,
    greedy,
    random_prompts,
    request,
    running,
    save_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def prefill(
    engine: TorchEngine, sink: Sink, name: str, prompt: list[int], sampling: SamplingParams
) -> tuple[bytes, EngineRequest]:
    """Compute `prompt` for a decode worker: its KV, and the request that continues it."""
    engine.submit(request(name, prompt, sampling, phase="prefill"))
    await sink.finished(name)
    assert sink.last[name].finish_reason == "length"
    layout = engine.spec.kv_layout
    assert layout is not None
    num_blocks = engine.kv.exported(name)
    assert num_blocks == layout.num_blocks(len(prompt))
    out = bytearray(num_blocks * layout.block_bytes)
    await asyncio.to_thread(engine.kv.read, name, 0, out)
    engine.kv.release(name)
    assert engine.kv.exported(name) == 0
    follow = request(
        name, prompt + sink.tokens[name], sampling, num_prompt_tokens=len(prompt), phase="decode"
    )
    return bytes(out), follow


@pytest.mark.parametrize("length", [5, 24, 45])
async def test_decode_continues_with_the_same_tokens(model: Path, length: int) -> None:
    prompt = random_prompts([length], seed=length)[0]
    async with running(model) as (source, told), running(model) as (target, sink):
        kv, follow = await prefill(source, told, "a", prompt, greedy(10))
        layout = source.spec.kv_layout
        assert layout is not None
        async with target.kv.reserve(follow) as reservation:
            assert (reservation.first_block, reservation.cached_tokens) == (0, 0)
            assert target.load().num_running == 1
            for first in range(reservation.num_blocks):  # a chunk of one block each
                part = kv[first * layout.block_bytes : (first + 1) * layout.block_bytes]
                await asyncio.to_thread(reservation.write, first, part)
            reservation.commit()
        await sink.finished("a")
        assert sink.cached["a"] == length
        stored = [e for e in sink.events if isinstance(e, BlocksStored)]
        if length >= 8:
            assert len(stored[0].block_hashes) == length // 8
            assert stored[0].parent_hash is None
    assert told.tokens["a"] + sink.tokens["a"] == generate(model, prompt, 10)


async def test_only_blocks_outside_the_prefix_cache_are_fetched(model: Path) -> None:
    shared, tail = random_prompts([24, 15])
    async with running(model) as (source, told), running(model) as (target, sink):
        target.submit(request("before", [*shared, 9], greedy(2)))
        await sink.finished("before")
        kv, follow = await prefill(source, told, "a", shared + tail, greedy(6))
        layout = source.spec.kv_layout
        assert layout is not None
        async with target.kv.reserve(follow) as reservation:
            assert (reservation.first_block, reservation.num_blocks) == (3, 2)
            assert reservation.cached_tokens == 24
            reservation.write(3, memoryview(kv)[3 * layout.block_bytes :])
            reservation.commit()
        await sink.finished("a")
    assert told.tokens["a"] + sink.tokens["a"] == generate(model, shared + tail, 6)


async def test_seeded_sampling_continues_across_the_handover(model: Path) -> None:
    prompt = random_prompts([20])[0]
    seeded = SamplingParams(max_tokens=10, temperature=1.0, seed=11, top_p=0.9)
    async with running(model) as (source, told), running(model) as (target, sink):
        source.submit(request("whole", prompt, seeded))
        await told.finished("whole")
        kv, follow = await prefill(source, told, "a", prompt, seeded)
        async with target.kv.reserve(follow) as reservation:
            reservation.write(0, np.frombuffer(kv, dtype=np.uint8))
            reservation.commit()
        await sink.finished("a")
    assert told.tokens["a"] + sink.tokens["a"] == told.tokens["whole"]


async def test_leaving_without_commit_frees_and_local_prefill_works(model: Path) -> None:
    prompt = random_prompts([30])[0]
    async with running(model) as (source, told), running(model) as (target, sink):
        _, follow = await prefill(source, told, "a", prompt, greedy(6))

        async def failing_transfer() -> None:
            async with target.kv.reserve(follow):
                assert target.load().active_blocks == 4
                raise ConnectionError("transfer failed")

        with pytest.raises(ConnectionError):
            await failing_transfer()
        assert target.load().active_blocks == 0
        target.submit(follow)
        await sink.finished("a")
        assert sink.cached["a"] == 0
    assert told.tokens["a"] + sink.tokens["a"] == generate(model, prompt, 6)


async def test_reservation_waits_for_room_in_turn_and_can_be_cancelled(model: Path) -> None:
    prompts = random_prompts([60, 60, 60])
    options = {"kv_cache_tokens": 128, "max_model_len": 128}
    async with running(model, **options) as (target, sink):
        target.submit(request("first", prompts[0], greedy(40)))
        await sink.started("first")
        entered = asyncio.Event()

        async def reserve(name: str, prompt: list[int]) -> None:
            follow = request(name, [*prompt, 3], greedy(3), num_prompt_tokens=60, phase="decode")
            async with target.kv.reserve(follow):
                entered.set()

        waiting = asyncio.create_task(reserve("second", prompts[1]))
        cancelled = asyncio.create_task(reserve("third", prompts[2]))
        await asyncio.sleep(0.01)
        assert not entered.is_set()
        assert target.load().num_waiting == 2
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert target.load().num_waiting == 1
        await sink.finished("first")
        async with asyncio.timeout(10):
            await waiting
        assert entered.is_set()


async def test_abort_reaches_waiting_and_filled_reservations(model: Path) -> None:
    prompts = random_prompts([72, 72])
    async with running(model, kv_cache_tokens=128) as (target, sink):
        held = request("held", [*prompts[0], 3], greedy(3), num_prompt_tokens=72, phase="decode")
        late = request("late", [*prompts[1], 3], greedy(3), num_prompt_tokens=72, phase="decode")
        layout = target.spec.kv_layout
        assert layout is not None

        async def wait_for_room() -> None:
            async with target.kv.reserve(late):
                pass

        async with target.kv.reserve(held) as reservation:
            waiter = asyncio.create_task(wait_for_room())
            await asyncio.sleep(0.01)
            assert target.load().num_waiting == 1
            target.abort("late")
            with pytest.raises(EngineFailed):
                await waiter
            target.abort("held")
            assert target.load().active_blocks == 0
            reservation.write(0, bytes(layout.block_bytes))  # too late: dropped
            reservation.commit()
        await sink.finished("held", "late")
        assert {output.finish_reason for output in sink.last.values()} == {"cancelled"}


async def test_held_blocks_survive_pressure_and_wrong_reads_are_refused(model: Path) -> None:
    prompts = random_prompts([40, 80, 80])
    async with running(model, kv_cache_tokens=136) as (engine, sink):
        layout = engine.spec.kv_layout
        assert layout is not None
        engine.submit(request("held", prompts[0], greedy(3), phase="prefill"))
        await sink.finished("held")
        before, after = (bytearray(5 * layout.block_bytes) for _ in range(2))
        engine.kv.read("held", 0, before)
        for name, prompt in zip("ab", prompts[1:], strict=True):
            engine.submit(request(name, prompt, greedy(3)))
            await sink.finished(name)
        engine.kv.read("held", 0, after)
        assert before == after
        with pytest.raises(ValueError, match="do not match"):
            engine.kv.read("held", 4, before)
        with pytest.raises(KeyError):
            engine.kv.read("unknown", 0, before)
        engine.kv.release("held")
        with pytest.raises(KeyError):
            engine.kv.read("held", 0, before)


async def test_kv_for_another_number_of_tokens_is_refused(model: Path) -> None:
    async with running(model) as (engine, _):
        lonely = request("a", [5], greedy(3), phase="decode")
        with pytest.raises(InvalidRequest):
            async with engine.kv.reserve(lonely):
                pass


async def test_an_aborted_id_can_be_reserved_again_before_its_first_context_ends(
    model: Path,
) -> None:
    follow = request("a", [5] * 20, greedy(3), num_prompt_tokens=19, phase="decode")
    async with running(model) as (engine, sink):
        first = engine.kv.reserve(follow)
        await first.__aenter__()
        engine.abort("a")
        await sink.finished("a")
        async with engine.kv.reserve(follow) as second:
            await first.__aexit__(None, None, None)
            assert engine.load().active_blocks == second.num_blocks == 3
        assert engine.load().active_blocks == 0


async def test_blocks_of_a_prefill_can_be_read_while_it_goes_on(model: Path) -> None:
    prompt = random_prompts([60])[0]
    async with running(model, max_num_batched_tokens=16) as (engine, sink):
        layout = engine.spec.kv_layout
        assert layout is not None
        early: dict[int, bytes] = {}
        counts = []
        launch = engine._runner.launch

        def look_before(chunks: Any) -> Any:
            count = engine.kv.computed("a")
            counts.append(count)
            if count:
                out = bytearray(count * layout.block_bytes)
                engine.kv.read("a", 0, out)
                early[count] = bytes(out)
            with pytest.raises(KeyError):
                engine.kv.read("a", 0, bytearray((count + 1) * layout.block_bytes))
            return launch(chunks)

        engine._runner.launch = look_before  # type: ignore[method-assign]
        engine.submit(request("a", prompt, greedy(4), phase="prefill"))
        await sink.finished("a")
        assert counts == [0, 2, 4, 6]
        whole = bytearray(engine.kv.computed("a") * layout.block_bytes)
        engine.kv.read("a", 0, whole)
        assert all(whole.startswith(part) for part in early.values())
        engine.kv.release("a")
        assert engine.kv.computed("a") == 0


async def test_blocks_outlive_their_request_for_as_long_as_they_are_copied(model: Path) -> None:
    prompt = random_prompts([60])[0]
    async with running(model) as (engine, sink):
        layout = engine.spec.kv_layout
        assert layout is not None
        engine.submit(request("a", prompt, greedy(4), phase="prefill"))
        await sink.finished("a")
        started, go_on = threading.Event(), threading.Event()
        gather = engine._runner.pool.gather

        def slow_gather(blocks: Any, out: Any) -> None:
            started.set()
            assert go_on.wait(10)
            gather(blocks, out)

        engine._runner.pool.gather = slow_gather  # type: ignore[method-assign]
        out = bytearray(3 * layout.block_bytes)
        reading = asyncio.create_task(asyncio.to_thread(engine.kv.read, "a", 2, out))
        await asyncio.to_thread(started.wait, 10)
        engine.abort("a")
        assert engine.load().active_blocks == 3
        go_on.set()
        await reading
        assert engine.load().active_blocks == 0
