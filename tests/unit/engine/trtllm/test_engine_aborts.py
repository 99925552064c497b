"""Aborts end a request at once and leak no block."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import generate, greedy, random_prompts, request
from unit.engine.trtllm_rig import (
    decode_request,
    prefilled,
    running,
    settled,
)


@pytest.mark.usefixtures("newest")
async def test_abort_ends_the_request_at_once_and_frees_its_blocks(folder: Path) -> None:
    async with running(folder) as (engine, sink):
        engine.submit(request("r", random_prompts([30])[0], greedy(200)))
        await sink.started("r", 3)
        engine.abort("r")
        engine.abort("nobody")
        await asyncio.sleep(0)
        await sink.finished("r")
        assert sink.last["r"].finish_reason == "cancelled"
        await settled(engine)
        assert engine.load().num_running == 0


@pytest.mark.usefixtures("newest")
async def test_abort_before_anything_ran(folder: Path) -> None:
    async with running(folder) as (engine, sink):
        for name, phase in (("a", "agg"), ("p", "prefill")):
            engine.submit(request(name, [5, 6, 7], greedy(20), phase=phase))
            engine.abort(name)
            await sink.finished(name)
            assert sink.last[name].finish_reason == "cancelled"
            assert sink.tokens[name] == []


@pytest.mark.usefixtures("newest")
async def test_committed_prefill_cannot_be_aborted(folder: Path) -> None:
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode") as (target, decode_sink),
    ):
        asked, last = await prefilled(source, prefill_sink, "r", random_prompts([40])[0])
        source.abort("r")
        target.submit(decode_request(asked, last))
        await decode_sink.finished("r")
        assert decode_sink.last["r"].finish_reason == "length"
        assert target.transfers.kv_transfer_failures == 0


@pytest.mark.usefixtures("newest")
async def test_abort_of_a_decode_waits_for_its_fetch(folder: Path) -> None:
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode") as (target, decode_sink),
    ):
        asked, last = await prefilled(source, prefill_sink, "r", random_prompts([40])[0], 200)
        target.submit(decode_request(asked, last))
        await asyncio.sleep(0)  # the library has it, and fetches
        target.abort("r")
        await decode_sink.finished("r")
        assert decode_sink.last["r"].finish_reason == "cancelled"
        assert decode_sink.tokens["r"] == []
        # Well before `kv_transfer_timeout_ms`, which would free it in any case.
        await settled(source, target, within_s=1.5)
        assert target.transfers.kv_transfers == 1


@pytest.mark.usefixtures("newest")
async def test_a_hundred_random_aborts_leak_no_block(tmp_path: Path) -> None:
    # Nothing is freed because its time is over.
    folder = rig.make_engine_dir(tmp_path, transfer_timeout_s=600)
    chance, num_too_late = random.Random(5), 0
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode", max_waiting=200) as (target, decode_sink),
    ):

        async def one(name: str, prompt: list[int]) -> None:
            nonlocal num_too_late
            asked = request(name, prompt, greedy(40), phase="prefill")
            source.submit(asked)
            aborts_prefill = chance.random() < 0.3
            if aborts_prefill:
                await asyncio.sleep(chance.random() * 0.02)
                source.abort(name)
            await prefill_sink.finished(name)
            last = prefill_sink.last[name]
            if last.kv_transfer_params is None:
                assert last.finish_reason == "cancelled"
                assert aborts_prefill
                return
            num_too_late += aborts_prefill
            target.submit(decode_request(asked, last))
            await asyncio.sleep(chance.random() * 0.05)
            target.abort(name)
            await decode_sink.finished(name)

        prompts = random_prompts([chance.randrange(3, 100) for _ in range(100)])
        for first in range(0, 100, 10):
            async with asyncio.TaskGroup() as tasks:
                for n in range(first, first + 10):
                    tasks.create_task(one(f"r{n}", prompts[n]))
        await settled(source, target)
        for engine in (source, target):
            rig.library(engine).check_integrity()
        # An abort that meets the last step may free what that step offers: not fetched, not leaked.
        assert target.transfers.kv_transfer_failures <= num_too_late
        # And it all still works.
        asked, last = await prefilled(source, prefill_sink, "after", prompts[0])
        target.submit(decode_request(asked, last))
        await decode_sink.finished("after")
        assert last.token_ids + decode_sink.tokens["after"] == generate(folder, prompts[0], 12)
