"""The adapter over the stand-in library: aggregated and disaggregated, every supported version."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving import block_hash
from serving.config import parse
from serving.engine.trtllm.build.llm_args import render
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.engine import TensorRtLlmEngine, Timeouts
from serving.engine.trtllm.versions import parse_version
from serving.errors import EngineFailed, InvalidRequest, OperatorError, Overloaded
from serving.protocol import BlocksRemoved, EngineOutput, EngineRequest, EngineTransferParams, Role
from unit.engine import trtllm_rig as rig
from unit.engine.torch_rig import Sink, generate, greedy, random_prompts, request
from unit.engine.trtllm_rig import NEWEST, VERSIONS, running, settled, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.make_engine_dir(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with rig.standin(monkeypatch):
        yield


def decode_request(prefill: EngineRequest, last: EngineOutput, **more: Any) -> EngineRequest:
    """As a frontend makes it, over the wire."""
    made = msgspec.structs.replace(
        prefill,
        token_ids=prefill.token_ids + last.token_ids,
        phase="decode",
        kv_transfer_params=last.kv_transfer_params,
        **more,
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=EngineRequest)


def num_removed(sink: Sink) -> int:
    return sum(len(e.block_hashes) for e in sink.events if isinstance(e, BlocksRemoved))


async def prefilled(
    engine: TensorRtLlmEngine, sink: Sink, name: str, prompt: list[int], max_tokens: int = 12
) -> tuple[EngineRequest, EngineOutput]:
    asked = request(name, prompt, greedy(max_tokens), phase="prefill")
    engine.submit(asked)
    await sink.finished(name)
    return asked, sink.last[name]


# --- every version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
async def test_greedy_output_is_the_models_in_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        prompts = random_prompts([5, 40, 70])
        async with running(engine_dir, block_size=size) as (engine, sink):
            assert engine.spec.num_blocks == rig.LIMITS["kv_cache_tokens"] // size
            assert engine.spec.kv_layout is None
            for n, prompt in enumerate(prompts):
                engine.submit(request(f"r{n}", prompt, greedy(12)))
            await sink.finished("r0", "r1", "r2")
            for n, prompt in enumerate(prompts):
                assert sink.tokens[f"r{n}"] == generate(engine_dir, prompt, 12)
                assert sink.last[f"r{n}"].finish_reason == "length"


@pytest.mark.parametrize("version", VERSIONS)
async def test_prefill_and_decode_give_the_same_output_in_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        prompt = random_prompts([70])[0]
        async with (
            running(engine_dir, "prefill", block_size=size) as (source, prefill_sink),
            running(engine_dir, "decode", block_size=size) as (target, decode_sink),
        ):
            asked, last = await prefilled(source, prefill_sink, "r", prompt)
            assert last.finish_reason == "length"
            assert isinstance(last.kv_transfer_params, EngineTransferParams)
            assert last.kv_transfer_params.source_instance == "prefill-0"
            target.submit(decode_request(asked, last))
            await decode_sink.finished("r")
            assert last.token_ids + decode_sink.tokens["r"] == generate(engine_dir, prompt, 12)
            assert decode_sink.cached["r"] == len(prompt)
            assert source.transfers.kv_transport == target.transfers.kv_transport == "nixl"
            stats = target.transfers
            assert (
                stats.kv_transfers,
                stats.kv_transfer_failures,
                stats.local_prefill_fallbacks,
            ) == (1, 0, 0)
            assert stats.kv_bytes_received > 0
            assert stats.kv_transfer_seconds > 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_arguments_that_build_engine_writes_are_taken_by_every_version(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rig.block_size(version)
    config = parse(
        {
            "engine": rig.LIMITS | {"block_size": size},
            "tensorrt_llm": {"guided_decoding": "none"},
            "kv_transfer": {"transport": "nixl"},
        }
    )
    roles: tuple[Role, ...] = ("agg", "prefill", "decode")
    with rig.standin(monkeypatch, version):
        engine_dir = rig.make_engine_dir(tmp_path, version)
        for role in roles:
            text = render(
                config,
                role,
                version=parse_version(version),
                flow="pytorch",
                spread=Parallelism(),
                dtype="float32",
            )
            (engine_dir / f"llm_args-{role}.yaml").write_text(text)
            async with running(engine_dir, role, block_size=size) as (engine, sink):
                engine.submit(request("r", [5, 6, 7], greedy(3)))
                await sink.finished("r")
                assert sink.tokens["r"] == generate(engine_dir, [5, 6, 7], 3)
                assert engine.transfers.kv_transport == ("" if role == "agg" else "nixl")


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1"])
async def test_built_engine_serves_where_its_backend_exists(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `trtllm-build` leaves it, as far as the stand-in looks."""
    config = parse(
        {
            "engine": rig.LIMITS | {"flow": "trtllm-build", "dtype": "float32"},
            "tensorrt_llm": {"guided_decoding": "none"},
        }
    )
    rig.make_engine_dir(tmp_path, version)
    built = tmp_path / "trtllm-tp1-pp1"
    shutil.copytree(tmp_path, built / "standin-model")
    (built / "rank0.engine").touch()
    limits = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 256}
    plugins = {"tokens_per_block": rig.BLOCK_SIZE, "use_paged_context_fmha": "enable"}
    content = {
        "version": version,
        "pretrained_config": {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}},
        "build_config": limits | {"plugin_config": plugins},
    }
    (built / "config.json").write_text(json.dumps(content))
    text = render(
        config,
        "agg",
        version=parse_version(version),
        flow="trtllm-build",
        spread=Parallelism(),
        dtype="float32",
        model=built.name,
    )
    (tmp_path / "llm_args-agg.yaml").write_text(text)
    manifest = rig.make_manifest(flow="trtllm-build")
    with rig.standin(monkeypatch, version):
        async with running(tmp_path, manifest=manifest) as (engine, sink):
            engine.submit(request("r", [5, 6, 7], greedy(3, logprobs=2)))
            await sink.finished("r")
            assert sink.tokens["r"] == generate(tmp_path, [5, 6, 7], 3)
            assert [row.token_id for row in sink.logprobs["r"]] == sink.tokens["r"]


# --- what an answer is -------------------------------------------------------------------------------


@pytest.mark.usefixtures("newest")
async def test_stop_tokens_end_a_request_and_are_not_told(folder: Path) -> None:
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
async def test_what_can_never_run_is_refused(folder: Path) -> None:
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


# --- aborts ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("newest")
async def test_abort_tells_at_once_and_frees(folder: Path) -> None:
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


# --- handovers that do not go as usual -----------------------------------------------------------------


@pytest.mark.usefixtures("newest")
async def test_prefill_with_nothing_left_to_decode_holds_nothing(folder: Path) -> None:
    async with running(folder, "prefill") as (engine, sink):
        _, last = await prefilled(engine, sink, "r", random_prompts([40])[0], max_tokens=1)
        assert (last.finish_reason, len(last.token_ids)) == ("length", 1)
        assert last.kv_transfer_params is None
        await settled(engine, within_s=1.5)


@pytest.mark.usefixtures("newest")
async def test_prefill_that_ends_on_its_end_id_is_over(folder: Path) -> None:
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


# --- health and start ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("newest")
async def test_silent_engine_fails_its_requests_and_takes_no_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "stuck"
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", f"hang@{stuck}")
    engine = rig.make_engine(folder, timeouts=Timeouts(health_s=0.1, probe_s=0.2))
    sink = Sink()
    await engine.start(sink)
    try:
        engine.submit(request("good", [5, 6, 7], greedy(4)))
        await sink.finished("good")
        stuck.touch()
        engine.submit(request("r", [5, 6, 7], greedy(4)))
        await sink.finished("r")
        error = sink.last["r"].error
        assert error is not None
        assert error.kind == "EngineFailed"
        with pytest.raises(EngineFailed, match="nothing within"):
            engine.submit(request("late", [5, 6, 7], greedy(4)))
    finally:
        await engine.close()


@pytest.mark.usefixtures("newest")
async def test_slow_engine_that_passes_its_probe_goes_on(folder: Path) -> None:
    async with running(folder, timeouts=Timeouts(health_s=0.005)) as (engine, sink):
        engine.submit(request("r", [5, 6, 7], greedy(100)))
        await sink.finished("r")
        assert sink.last["r"].finish_reason == "length"


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("fail", "means"),
    [("oom", "memory"), ("no_gpu", "no NVIDIA GPU"), ("hang:0", "generated nothing")],
)
async def test_failed_start_is_one_paragraph(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fail: str, means: str
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", fail)
    with pytest.raises(OperatorError, match=means) as caught:
        await rig.make_engine(folder, timeouts=Timeouts(start_s=0.3)).start(Sink())
    assert caught.value.remedy


async def test_missing_library_and_unsupported_version_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig._forget()  # other tests of this process may have had the stand-in
    without = [entry for entry in sys.path if not (Path(entry) / "tensorrt_llm").exists()]
    monkeypatch.setattr(sys, "path", without)
    with pytest.raises(OperatorError, match="not installed"):
        await rig.make_engine(folder).start(Sink())
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.21.0"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(OperatorError, match=r"0\.21\.0"):
            await rig.make_engine(folder).start(Sink())
    finally:
        rig._forget()


@pytest.mark.usefixtures("newest")
async def test_engine_for_another_version_or_block_size_is_refused(folder: Path) -> None:
    manifest = rig.make_manifest(stamp={"tensorrt_llm": "1.2.1"})
    with pytest.raises(OperatorError, match=r"1\.2\.1") as caught:
        await rig.make_engine(folder, manifest=manifest).start(Sink())
    assert NEWEST in caught.value.what
    with pytest.raises(OperatorError, match=r"blocks of 16 tokens.*block_size` is 32"):
        await rig.make_engine(folder, block_size=32).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_persons_argument_that_is_unknown_is_named(tmp_path: Path) -> None:
    engine_dir = rig.make_engine_dir(tmp_path, changes={"enable_magic": True})
    with pytest.raises(OperatorError, match=f"{NEWEST} has no argument `enable_magic`"):
        await rig.make_engine(engine_dir).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_built_engine_is_refused_where_the_backend_is_gone(folder: Path) -> None:
    manifest = rig.make_manifest(flow="trtllm-build")
    with pytest.raises(OperatorError, match="can no longer load"):
        await rig.make_engine(folder, manifest=manifest).start(Sink())


@pytest.mark.usefixtures("newest")
async def test_close_ends_what_runs(folder: Path) -> None:
    engine, sink = rig.make_engine(folder), Sink()
    await engine.start(sink)
    engine.submit(request("r", [5, 6, 7], greedy(200)))
    await sink.started("r")
    await engine.close()
    assert sink.last["r"].finish_reason == "cancelled"
    await engine.close()  # nothing left to do
