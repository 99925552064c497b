"""The stand-in keeps the contract's promises, and sets its traps."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import importlib
import inspect
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic
import pytest
from integration.tiny_model import save_tiny_model
from standin.install import install

from . import standin_rig as rig

PROMPT = [5 + i % 300 for i in range(37)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """What transformers says, greedily, after PROMPT."""
    from unit.engine.torch_rig import generate

    return generate(model, PROMPT, 12)


@pytest.fixture(params=rig.VERSIONS)
def any_version(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> Iterator[Any]:
    with rig.installed(tmp_path, request.param) as root:
        library = rig.Library(root, model)
        yield library
        library.shut_down()


@pytest.fixture
def library(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("STANDIN_TRTLLM_TRANSPORT", "tcp")
    with rig.installed(tmp_path, rig.NEWEST) as root:
        library = rig.Library(root, model)
        yield library
        library.shut_down()


async def steps(result: Any) -> list[tuple[list[int], list[int], str | None]]:
    """(cumulative ids, their difference, finish_reason) of each response."""
    seen = []
    async with asyncio.timeout(rig.DEADLINE_S):
        async for step in result:
            assert step is result
            output = step.outputs[0]
            seen.append((list(output.token_ids), output.token_ids_diff, output.finish_reason))
    return seen


# --- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", rig.VERSIONS)
def test_installed_copy_is_found_by_name_and_version(tmp_path: Path, version: str) -> None:
    root = install(tmp_path / "there", version)
    found = next(iter(metadata.distributions(path=[str(root)])))
    assert (found.metadata["Name"], found.version) == ("tensorrt_llm", version)
    code = "import tensorrt_llm; print(tensorrt_llm.__version__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=rig.environment(root, STANDIN_TRTLLM_VERSION="ignored"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [f"[TensorRT-LLM] TensorRT LLM version: {version}", version]


def test_version_without_a_contract_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.9\.0 is none of 1\.0\.0"):
        install(tmp_path / "there", "0.9.0")


def test_names_and_signatures_are_the_versions_own(any_version: Any) -> None:
    version, api = any_version.top.__version__, any_version.api
    parameters = list(inspect.signature(api.LLM.generate_async).parameters)
    assert parameters[:8] == [
        *("self", "inputs", "sampling_params", "lora_request", "prompt_adapter_request"),
        *("streaming", "kv_cache_retention_config", "disaggregated_params"),
    ]
    # 1.3 inserts in the middle: what came eighth by position is another argument now.
    eighth = "trace_headers" if version == rig.NEWEST else "_postproc_params"
    assert parameters[8] == eighth
    assert ("cache_salt" in parameters) == (version != "1.0.0")
    fields = {field.name for field in dataclasses.fields(api.DisaggregatedParams)}
    assert ("disagg_request_id" in fields) == (version == rig.NEWEST)
    assert ("tokens_per_block" in api.KvCacheConfig.model_fields) == (version != "1.0.0")
    assert ("enable_mixed_sampler" in api.TorchLlmArgs.model_fields) == (version == "1.0.0")
    backend = "ucx" if version == "1.0.0" else "UCX"
    assert api.CacheTransceiverConfig(backend=backend).backend == backend
    with pytest.raises(pydantic.ValidationError):
        api.CacheTransceiverConfig(backend=backend.swapcase())
    if version == rig.NEWEST:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("tensorrt_llm._tensorrt_engine")
        with pytest.raises(ValueError, match="removed"):
            api.LLM(model="x", backend="tensorrt")
    else:
        assert importlib.import_module("tensorrt_llm._tensorrt_engine").LLM


def test_what_the_contract_does_not_have_raises(library: Any) -> None:
    api = library.api
    with pytest.raises(pydantic.ValidationError, match="made_up"):
        library.llm(made_up=1)
    with pytest.raises(pydantic.ValidationError, match="made_up"):
        api.KvCacheConfig(made_up=1)
    with pytest.raises(pydantic.ValidationError, match="model"):
        api.TorchLlmArgs()
    with pytest.raises(TypeError):
        api.SamplingParams(made_up=1)
    with pytest.raises(TypeError):
        api.SamplingParams(5)  # keywords only
    with pytest.raises(AttributeError):
        api.SamplingParams().made_up = 1  # slots
    with pytest.raises(TypeError):
        api.DisaggregatedParams("context_only")
    with pytest.raises(ValueError, match="Unknown request type"):
        api.DisaggregatedParams(request_type="prefill")
    llm = library.llm()
    with pytest.raises(TypeError, match="stream"):
        llm.generate_async(inputs=PROMPT, stream=True)


# --- sampling ------------------------------------------------------------------------------------


def test_sampling_defaults_and_refusals(any_version: Any) -> None:
    sampling = any_version.top.SamplingParams
    plain = sampling()
    assert (plain.max_tokens, plain.end_id, plain.best_of, plain.detokenize) == (32, None, 1, True)
    assert sampling(end_id=7).pad_id == 7
    for greedy in ({}, {"temperature": 0}, {"top_k": 1, "temperature": 1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="Greedy decoding"):
            sampling(best_of=2, **greedy)
    assert sampling(best_of=2, temperature=0.5).best_of == 2
    with pytest.raises(ValueError, match="top_p"):
        sampling(top_p=1.5)
    guided = any_version.api.GuidedDecodingParams
    with pytest.raises(ValueError, match="Only one"):
        sampling(guided_decoding=guided(regex="a", json_object=True))


async def test_end_id_is_needed_without_a_tokenizer_and_turns_stop_strings_off_with_one(
    library: Any,
) -> None:
    blind, reading = library.llm(), library.llm(skip_tokenizer_init=False)
    with pytest.raises(ValueError, match="tokenizer is required to reset end_id"):
        blind.generate_async(inputs=PROMPT, sampling_params=library.top.SamplingParams())
    with pytest.raises(RuntimeError, match="not processed by tokenizer"):
        reading.generate_async(inputs=PROMPT, sampling_params=library.sampling(stop="fox"))
    own = library.top.SamplingParams(max_tokens=4)
    result = await reading.generate_async(inputs="The quick brown", sampling_params=own)
    assert own.end_id == 2, "the caller's object is changed"
    assert result.outputs[0].text != ""


async def test_greedy_tokens_are_those_of_transformers(any_version: Any, expected: Any) -> None:
    llm = any_version.llm()
    seen = await steps(
        llm.generate_async(inputs=PROMPT, sampling_params=any_version.sampling(12), streaming=True)
    )
    assert [ids for ids, _, _ in seen] == [expected[: i + 1] for i in range(12)]
    assert [reason for _, _, reason in seen] == [None] * 11 + ["length"]
    result = await llm.generate_async(inputs=PROMPT, sampling_params=any_version.sampling(12))
    assert result.finished
    assert not result.aborted()
    assert result.outputs[0].token_ids == expected


async def test_unseeded_requests_draw_alike(library: Any) -> None:
    llm = library.llm()
    drawn = [
        (
            await llm.generate_async(
                inputs=PROMPT, sampling_params=library.sampling(8, temperature=1.5, **seed)
            )
        )
        .outputs[0]
        .token_ids
        for seed in ({}, {}, {"seed": 0}, {"seed": 1})
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != drawn[3]


async def test_first_release_is_greedy_unless_told_to_look(
    tmp_path: Path, model: Path, expected: list[int]
) -> None:
    with rig.installed(tmp_path, "1.0.0") as root:
        library = rig.Library(root, model)
        told = library.sampling(8, temperature=1.5, seed=3)
        careless, careful = library.llm(), library.llm(enable_mixed_sampler=True)
        outputs = [
            (await llm.generate_async(inputs=PROMPT, sampling_params=told)).outputs[0].token_ids
            for llm in (careless, careful)
        ]
        library.shut_down()
    assert outputs[0] == expected[:8]
    assert outputs[1] != expected[:8]


async def test_an_end_id_stays_and_a_stop_id_is_cut_off(library: Any, expected: Any) -> None:
    llm = library.llm()
    stop = expected[3]
    until = expected.index(stop)

    async def run(max_tokens: int, **ends: Any) -> Any:
        params = library.sampling(max_tokens, logprobs=1, **ends)
        return (await llm.generate_async(inputs=PROMPT, sampling_params=params)).outputs[0]

    ended = await run(12, end_id=stop)
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (
        expected[: until + 1],
        "stop",
        None,
    )
    stopped = await run(12, stop_token_ids=[stop])
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (
        expected[:until],
        "stop",
        stop,
    )
    assert len(stopped.logprobs) == until + 1, "log-probabilities are not cut"
    # The limit is looked at before other stops are.
    full = await run(until + 1, stop_token_ids=[stop])
    assert (full.token_ids, full.finish_reason) == (expected[: until + 1], "length")
    ignored = await run(12, end_id=stop, ignore_eos=True)
    assert ignored.token_ids == expected


async def test_logprobs_are_maps_with_integer_keys(library: Any, expected: Any) -> None:
    llm = library.llm()

    async def logprobs(number: int) -> Any:
        params = library.sampling(3, logprobs=number)
        return (await llm.generate_async(inputs=PROMPT, sampling_params=params)).outputs[0].logprobs

    assert await logprobs(0) == []  # 0 reads as none at all
    two = await logprobs(2)
    assert [set(map(type, each)) for each in two] == [{int}] * 3
    assert [each[token].rank for each, token in zip(two, expected, strict=False)] == [1, 1, 1]
    assert all(len(each) == 2 and max(v.logprob for v in each.values()) < 0 for each in two)


async def test_long_prompts_need_chunks(library: Any, expected: Any) -> None:
    strict = library.llm(max_num_tokens=16)
    with pytest.raises(ValueError, match=r"should not exceed max_num_tokens \(16\)"):
        strict.generate_async(inputs=PROMPT, sampling_params=library.sampling())
    chunked = library.llm(max_num_tokens=16, enable_chunked_prefill=True)
    result = await chunked.generate_async(inputs=PROMPT, sampling_params=library.sampling(4))
    assert result.outputs[0].token_ids == expected[:4]
    with pytest.raises(library.errors.RequestError, match="leave no room"):
        await chunked.generate_async(inputs=[5] * 256, sampling_params=library.sampling())


async def test_salted_requests_do_not_share_their_cache(library: Any) -> None:
    llm = library.llm()
    cached = []
    for salt in (None, None, "a", "a"):
        result = await llm.generate_async(
            inputs=PROMPT, sampling_params=library.sampling(2), cache_salt=salt
        )
        cached.append(result.cached_tokens)
    assert cached == [0, 32, 0, 32]


async def test_random_aborts_leave_nothing(library: Any) -> None:
    llm, draw = library.llm(), random.Random(5)
    results = []
    for _ in range(100):
        length = draw.randrange(5, 100)
        prompt = [draw.randrange(5, 250) for _ in range(length)]
        params = library.sampling(draw.randrange(1, 30))
        results.append(llm.generate_async(inputs=prompt, sampling_params=params, streaming=True))
        if draw.random() < 0.7:
            results[draw.randrange(len(results))].abort()
        await asyncio.sleep(draw.random() * 0.004)
    for result in results:
        async with asyncio.timeout(rig.DEADLINE_S):
            await result
        assert (
            result.outputs[0].finish_reason == "cancelled"
            or not result.aborted()
            or (result.outputs[0].finish_reason == "length")
        )
    await rig.idle(llm)


async def test_shut_down_ends_everything(library: Any) -> None:
    llm = library.llm()
    running = llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(200))
    await asyncio.to_thread(llm.shutdown)
    await running
    assert running.outputs[0].finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async(inputs=PROMPT, sampling_params=library.sampling())


# --- disaggregation ------------------------------------------------------------------------------


async def test_nothing_is_handed_over_without_a_transceiver(library: Any) -> None:
    llm = library.llm()
    with pytest.raises(library.errors.RequestError, match="cache_transceiver_config is not set"):
        await llm.generate_async(
            inputs=PROMPT,
            sampling_params=library.sampling(),
            disaggregated_params=library.context(),
        )


async def prefilled(library: Any, llm: Any, prompt: list[int] = PROMPT, **sampling: Any) -> Any:
    result = await llm.generate_async(
        inputs=prompt,
        sampling_params=library.sampling(**sampling),
        disaggregated_params=library.context(),
    )
    return result.outputs[0]


async def test_context_makes_one_token_and_holds_its_blocks(library: Any, expected: Any) -> None:
    context, generation = library.pair()
    reasons = []
    for _ in range(2):
        output = await prefilled(library, context, max_tokens=12)
        assert output.token_ids == expected[:1]
        reasons.append(output.finish_reason)
        assert context._executor.load().active_blocks == 5
        params = dataclasses.replace(output.disaggregated_params, request_type="generation_only")
        seen = await steps(
            generation.generate_async(
                inputs=PROMPT,
                sampling_params=library.sampling(12),
                streaming=True,
                disaggregated_params=params,
            )
        )
        # The first response repeats the context's token, and the difference leaves it out.
        assert seen[0][:2] == (expected[:2], expected[1:2])
        assert seen[-1][0] == expected
        await rig.idle(context)
    assert set(reasons) == {"length", "not_finished"}
    await rig.idle(generation)


async def test_context_ends_by_time_and_by_no_abort(library: Any) -> None:
    context, generation = library.pair(timeout_ms=400)
    result = context.generate_async(
        inputs=PROMPT,
        sampling_params=library.sampling(),
        disaggregated_params=library.context(),
    )
    params = (await result).outputs[0].disaggregated_params
    result.abort()  # finished: without effect
    await asyncio.sleep(0.05)
    assert context._executor.load().active_blocks == 5
    # Aborted before its first output, a generation never fetches.
    params = dataclasses.replace(params, request_type="generation_only")
    aborted = generation.generate_async(
        inputs=PROMPT, sampling_params=library.sampling(), disaggregated_params=params
    )
    aborted.abort()
    await aborted
    assert aborted.outputs[0].finish_reason == "cancelled"
    assert context._executor.load().active_blocks == 5
    await rig.idle(context)
    with pytest.raises(library.errors.RequestError):
        await generation.generate_async(
            inputs=PROMPT, sampling_params=library.sampling(), disaggregated_params=params
        )
    await rig.idle(generation)


async def test_context_that_ends_on_its_end_id_holds_nothing(library: Any, expected: Any) -> None:
    context, _ = library.pair()
    output = await prefilled(library, context, end_id=expected[0])
    assert (output.token_ids, output.finish_reason) == (expected[:1], "stop")
    assert output.disaggregated_params.opaque_state is None
    await rig.idle(context)


async def test_generation_refuses_another_prompt_and_other_bytes(library: Any) -> None:
    context, generation = library.pair()
    params = (await prefilled(library, context)).disaggregated_params
    params = dataclasses.replace(params, request_type="generation_only")
    wrong = dataclasses.replace(params, opaque_state=b"made up")
    for prompt, given in ((PROMPT[:-1], params), (PROMPT, wrong)):
        with pytest.raises(library.errors.RequestError):
            await generation.generate_async(
                inputs=prompt, sampling_params=library.sampling(), disaggregated_params=given
            )
    state = bytearray(params.opaque_state)
    nonce = state.index(b"nonce") + 8
    state[nonce : nonce + 4] = b"0000" if state[nonce : nonce + 4] != b"0000" else b"1111"
    forged = dataclasses.replace(params, opaque_state=bytes(state))
    with pytest.raises(library.errors.RequestError, match="nonce"):
        await generation.generate_async(
            inputs=PROMPT, sampling_params=library.sampling(), disaggregated_params=forged
        )
    assert context._executor.load().active_blocks == 5


async def test_generation_tells_how_long_it_fetched(library: Any) -> None:
    context, generation = library.pair(return_perf_metrics=True)
    params = (await prefilled(library, context)).disaggregated_params
    result = await generation.generate_async(
        inputs=PROMPT,
        sampling_params=library.sampling(3),
        disaggregated_params=dataclasses.replace(params, request_type="generation_only"),
    )
    metrics = result.outputs[0].request_perf_metrics
    timing = metrics.timing_metrics
    assert timing.kv_cache_size == 5 * 8 * 2 * 2 * 2 * 16 * 4  # blocks, tokens, K/V, ..., float32
    assert (timing.kv_cache_transfer_end - timing.kv_cache_transfer_start).total_seconds() > 0
    assert metrics.kv_cache_metrics.num_total_allocated_blocks == 5


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["UCX", "NIXL"])
async def test_two_processes_exchange_kv(
    tmp_path: Path, model: Path, expected: list[int], backend: str
) -> None:
    with rig.installed(tmp_path, "1.2.1") as root:
        library = rig.Library(root, model)
        program = Path(rig.__file__).parents[3] / "standin" / "context_process.py"
        context = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", str(program), str(model), backend),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=rig.environment(root),
        )
        assert context.stdin
        assert context.stdout

        async def ask(prompt: list[int]) -> dict[str, Any]:
            assert context.stdin
            assert context.stdout
            context.stdin.write(json.dumps(prompt).encode() + b"\n")
            return dict(json.loads(await context.stdout.readline()))

        try:
            async with asyncio.timeout(60):
                while await context.stdout.readline() != b"ready\n":
                    pass
                body = await ask(PROMPT)
                assert body.pop("active_blocks") == 5
                body["opaque_state"] = base64.b64decode(body["opaque_state"])
                transceiver = library.api.CacheTransceiverConfig(backend=backend)
                generation = library.llm(cache_transceiver_config=transceiver)
                params = library.api.DisaggregatedParams(
                    **body | {"request_type": "generation_only"}
                )
                result = await generation.generate_async(
                    inputs=PROMPT,
                    sampling_params=library.sampling(12),
                    disaggregated_params=params,
                )
                assert result.outputs[0].token_ids == expected
                while (await ask([]))["active_blocks"]:
                    pass  # the answer takes its time
        finally:
            context.stdin.close()
            await context.wait()
            library.shut_down()


# --- events and statistics -----------------------------------------------------------------------


async def read(answers: Any) -> list[dict[str, Any]]:
    return [answer async for answer in answers]


async def test_events_tell_the_cache_in_the_contracts_form(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1000, "max_tokens": 256})
    with pytest.raises(AssertionError, match="not properly instantiated"):
        llm.get_kv_cache_events_async(timeout=0.1)
    await llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(8))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    assert [event["event_id"] for event in events] == list(range(len(events)))
    assert {event["window_size"] for event in events} == {256}
    assert events[0]["data"] == {"type": "created", "num_blocks_per_cache_level": [32, 0]}
    stored = [event["data"] for event in events[1:]]
    assert {data["type"] for data in stored} == {"stored"}
    blocks = [block for data in stored for block in data["blocks"]]
    assert set(blocks[0]) == {"type", "block_hash", "tokens", "cache_level", "priority"}
    assert set(blocks[0]["tokens"][0]) == {"type", "token_id", "token_extra_id"}
    told = [[token["token_id"] for token in block["tokens"]] for block in blocks]
    assert [token for tokens in told for token in tokens][: len(PROMPT)] == PROMPT
    # 37 prompt tokens and 7 of 8 new ones have KV: five blocks, and one partly filled.
    assert [len(tokens) for tokens in told] == [8] * 5 + [4]
    parent = None
    for data in stored:
        assert data["parent_hash"] == parent
        parent = data["blocks"][-1]["block_hash"]
    assert all(0 <= block["block_hash"] < 2**64 for block in blocks)

    for start in range(10):  # more than fits
        other = [start] + [7 + i % 90 for i in range(60)]
        await llm.generate_async(inputs=other, sampling_params=library.sampling(2))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    removed = [e["data"] for e in events if e["data"]["type"] == "removed"]
    gone = {value for data in removed for value in data["block_hashes"]}
    assert {block["block_hash"] for block in blocks} <= gone


async def test_an_iterator_that_timed_out_lives_again_with_the_next_request(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1000})
    await llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(2))
    assert await read(llm.get_kv_cache_events_async(timeout=0.1))
    answers = llm.get_kv_cache_events_async(timeout=0.1)
    llm._executor.events_result.put(json.dumps({"late": 1}))
    assert await read(answers) == [], "ended, whatever has come since"
    await llm.generate_async(inputs=PROMPT[::-1], sampling_params=library.sampling(2))
    assert (await read(llm.get_kv_cache_events_async(timeout=0.1)))[0] == {"late": 1}


async def test_events_that_overflow_leave_a_gap(library: Any) -> None:
    llm = library.llm(kv={"event_buffer_max_size": 1})
    for first in (5, 6, 7):
        prompt = [first, *PROMPT]
        await llm.generate_async(inputs=prompt, sampling_params=library.sampling(6))
    events = await read(llm.get_kv_cache_events_async(timeout=0.1))
    ids = [event["event_id"] for event in events]
    assert ids == sorted(ids)
    assert len(ids) < ids[-1] + 1


async def test_evicted_blocks_go_to_host_memory_first(library: Any) -> None:
    layer_bytes = 8 * 2 * 2 * 2 * 16 * 4
    llm = library.llm(
        kv={"event_buffer_max_size": 1000, "max_tokens": 256, "host_cache_size": 4 * layer_bytes}
    )
    for start in range(10):
        other = [start] + [7 + i % 90 for i in range(60)]
        await llm.generate_async(inputs=other, sampling_params=library.sampling(2))
    events = [e["data"] for e in await read(llm.get_kv_cache_events_async(timeout=0.1))]
    assert events[0]["num_blocks_per_cache_level"] == [32, 4]
    updated = [data for data in events if data["type"] == "updated"]
    assert updated[0]["cache_level"] == {"type": "event_diff", "new_value": 1, "old_value": 0}
    assert any(data["type"] == "removed" for data in events)


@pytest.mark.parametrize("kv", [{}, {"event_buffer_max_size": 9, "enable_block_reuse": False}])
async def test_no_events_unless_there_is_a_buffer_and_reuse(library: Any, kv: Any) -> None:
    llm = library.llm(kv=kv)
    for _ in range(2):
        result = await llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(2))
    assert result.cached_tokens == (0 if kv else 32)
    assert await read(llm.get_kv_cache_events_async(timeout=0.05)) == []


async def test_statistics_are_the_contracts_json(library: Any) -> None:
    contract = json.loads((library.root / "tensorrt_llm" / "contract.json").read_text())["stats"]
    silent, llm = library.llm(), library.llm(enable_iter_perf_stats=True)
    assert await read(llm.get_stats_async(timeout=0.05)) == [], "nothing before the first request"
    for each in (silent, llm):
        await each.generate_async(inputs=PROMPT, sampling_params=library.sampling(12))
    assert await read(silent.get_stats_async(timeout=0.05)) == []
    stats = await read(llm.get_stats_async(timeout=1.0))
    assert all(list(each) == contract["top"] for each in stats)
    caches = [each["kvCacheStats"] for each in stats]
    assert None in caches, "nested objects may be null"
    cache = next(each for each in caches if each is not None)
    assert list(cache) == contract["kvCacheStats"]
    assert (cache["maxNumBlocks"], cache["tokensPerBlock"]) == (256, 8)
    assert max(each["usedNumBlocks"] for each in caches if each) == 6


# --- failures and the other flow -----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cause"), [("oom", "out of memory"), ("no_gpu", "No CUDA GPUs")])
def test_it_fails_to_start_when_told(
    library: Any, monkeypatch: pytest.MonkeyPatch, kind: str, cause: str
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", kind)
    with pytest.raises(RuntimeError, match="Executor worker returned error") as caught:
        library.llm()
    assert cause in str(caught.value.__cause__)


async def test_it_hangs_when_told(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STANDIN_TRTLLM_FAIL", f"hang@{tmp_path / 'hang'}")
    llm = library.llm()
    await llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(2))
    (tmp_path / "hang").touch()
    result = llm.generate_async(inputs=PROMPT, sampling_params=library.sampling(2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await result


def test_more_gpus_than_there_are(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RuntimeError, match="Only 1 GPUs are available, but 2 are required"):
        library.llm(tensor_parallel_size=2)


def tool(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, env=rig.environment(root), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def engine(tmp_path: Path, model: Path) -> Iterator[tuple[Path, Path]]:
    """Installed as 1.2.1, and an engine built there for 2 x 1 GPUs."""
    with rig.installed(tmp_path, "1.2.1") as root:
        script = root / "examples" / "models" / "core" / "llama" / "convert_checkpoint.py"
        checkpoint, built = str(tmp_path / "checkpoint"), tmp_path / "built"
        paths = ("--model_dir", str(model), "--output_dir", checkpoint)
        sizes = ("--dtype", "float32", "--tp_size", "2", "--pp_size", "1")
        done = tool(root, sys.executable, str(script), *paths, *sizes)
        assert done.returncode == 0, done.stderr
        limits = ("--max_batch_size", "4", "--max_seq_len", "128", "--max_num_tokens", "64")
        plugins = ("--tokens_per_block", "16", "--use_paged_context_fmha", "enable")
        paths = ("--checkpoint_dir", checkpoint, "--output_dir", str(built))
        done = tool(root, "trtllm-build", *paths, *limits, *plugins)
        assert done.returncode == 0, done.stderr
        yield root, built


async def test_a_built_engine_loads_and_generates(
    engine: tuple[Path, Path], expected: list[int]
) -> None:
    _, built = engine
    config = json.loads((built / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert config["pretrained_config"]["mapping"]["tp_size"] == 2
    assert sorted(path.name for path in built.glob("rank*")) == ["rank0.engine", "rank1.engine"]
    flow: Any = importlib.import_module("tensorrt_llm._tensorrt_engine")
    top: Any = importlib.import_module("tensorrt_llm")
    with pytest.raises(ValueError, match="tp_size 4 is not consistent with the engine's tp_size 2"):
        flow.LLM(model=str(built), tensor_parallel_size=4)
    with pytest.raises(ValueError, match="max_batch_size"):
        flow.LLM(model=str(built), max_batch_size=8)
    llm = flow.LLM(model=str(built), skip_tokenizer_init=True, enable_chunked_prefill=True)
    params = top.SamplingParams(end_id=-1, max_tokens=6)
    result = await llm.generate_async(inputs=PROMPT, sampling_params=params)
    assert result.outputs[0].token_ids == expected[:6]
    with pytest.raises(ValueError, match="gather_generation_logits"):
        llm.generate_async(inputs=PROMPT, sampling_params=top.SamplingParams(end_id=-1, logprobs=1))
    llm.shutdown()
    (built / "rank1.engine").unlink()
    with pytest.raises(FileNotFoundError):
        flow.LLM(model=str(built))


def test_build_tools_refuse_flags_they_do_not_have(engine: tuple[Path, Path]) -> None:
    root, _ = engine
    for argv in (["trtllm-build", "--max_output_len", "5"], ["trtllm-build", "--gemm_plugin", "x"]):
        done = tool(root, *argv)
        assert done.returncode == 2
        assert "usage: trtllm-build" in done.stderr


def test_the_newest_version_brings_no_build_tools(tmp_path: Path) -> None:
    assert not (install(tmp_path / "there", rig.NEWEST) / "bin").exists()
