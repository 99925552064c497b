"""Handovers of KV that do not go as usual."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.protocol import EngineTransferParams
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import generate, greedy, random_prompts, request
from unit.engine.trtllm_rig import (
    decode_request,
    prefilled,
    running,
    settled,
)


@pytest.mark.usefixtures("newest")
async def test_prefill_with_nothing_left_to_decode_holds_nothing(folder: Path) -> None:
    async with running(folder, "prefill") as (engine, sink):
        _, last = await prefilled(engine, sink, "r", random_prompts([40])[0], max_tokens=1)
        assert (last.finish_reason, len(last.token_ids)) == ("length", 1)
        assert last.kv_transfer_params is None
        await settled(engine, within_s=1.5)


@pytest.mark.usefixtures("newest")
async def test_prefill_that_ends_on_its_end_id_needs_no_decode(folder: Path) -> None:
    prompt = random_prompts([40])[0]
    first = generate(folder, prompt, 1)[0]
    manifest = rig.make_manifest(eos_token_ids=[first, 3])
    async with running(folder, "prefill", manifest=manifest) as (engine, sink):
        sampling = greedy(9, stop_token_ids=(first, 3))
        engine.submit(request("r", prompt, sampling, phase="prefill"))
        await sink.finished("r")
        last = sink.last["r"]
        assert (last.finish_reason, last.stop_token_id) == ("stop", first)
        assert last.token_ids == []
        assert last.kv_transfer_params is None
        await settled(engine, within_s=1.5)  # before `kv_transfer_timeout_ms`


@pytest.mark.usefixtures("newest")
async def test_prefill_that_ends_on_another_stop_is_fetched_and_over(folder: Path) -> None:
    prompt = random_prompts([40])[0]
    first = generate(folder, prompt, 1)[0]
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode") as (target, decode_sink),
    ):
        asked = request("r", prompt, greedy(9, stop_token_ids=(2, first)), phase="prefill")
        source.submit(asked)
        await prefill_sink.finished("r")
        last = prefill_sink.last["r"]
        assert last.token_ids == []
        assert last.kv_transfer_params is not None
        target.submit(decode_request(asked, last))
        await decode_sink.finished("r")
        last = decode_sink.last["r"]
        assert (last.token_ids, last.finish_reason, last.stop_token_id) == ([], "stop", first)
        await settled(source, target, within_s=1.5)


@pytest.mark.usefixtures("newest")
async def test_kv_that_cannot_be_fetched_is_computed_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompts([40])[0]
    async with (
        running(folder, "prefill") as (source, prefill_sink),
        running(folder, "decode") as (target, decode_sink),
    ):
        asked, last = await prefilled(source, prefill_sink, "r", prompt)
        monkeypatch.setenv("STANDIN_TRTLLM_FAIL", "fetch")
        target.submit(decode_request(asked, last))
        await decode_sink.finished("r")
        assert last.token_ids + decode_sink.tokens["r"] == generate(folder, prompt, 12)
        stats = target.transfers
        assert (stats.kv_transfers, stats.kv_transfer_failures, stats.local_prefill_fallbacks) == (
            0,
            1,
            1,
        )


@pytest.mark.usefixtures("newest")
async def test_damaged_kv_params_are_computed_here(folder: Path) -> None:
    prompt = random_prompts([40])[0]
    async with running(folder, "decode") as (target, sink):
        for n, state in enumerate(
            ({}, {"params": {"opaque_state": b"nonsense", "ctx_request_id": 1}, "num_tokens": 40})
        ):
            params = EngineTransferParams("prefill-9", 0, "r", state)
            first = generate(folder, prompt, 1)
            target.submit(
                request(
                    f"r{n}",
                    prompt + first,
                    greedy(12),
                    num_prompt_tokens=40,
                    phase="decode",
                    kv_transfer_params=params,
                )
            )
            await sink.finished(f"r{n}")
            assert first + sink.tokens[f"r{n}"] == generate(folder, prompt, 12)
        assert (
            target.transfers.kv_transfer_failures == target.transfers.local_prefill_fallbacks == 2
        )


@pytest.mark.usefixtures("newest")
async def test_each_role_also_serves_alone(folder: Path) -> None:
    prompt = random_prompts([40])[0]
    for role in ("prefill", "decode"):
        async with running(folder, role) as (engine, sink):  # type: ignore[arg-type]
            engine.submit(request("r", prompt, greedy(12)))
            await sink.finished("r")
            assert sink.tokens["r"] == generate(folder, prompt, 12)
