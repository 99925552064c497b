"""The stand-in has the contract's names, and samples as the library does."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pydantic
import pytest
from standin.install import install
from unit.engine.trtllm.standin import standin_rig as rig


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
        llm.generate_async(inputs=rig.PROMPT, stream=True)


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
        blind.generate_async(inputs=rig.PROMPT, sampling_params=library.top.SamplingParams())
    with pytest.raises(RuntimeError, match="not processed by tokenizer"):
        reading.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(stop="fox"))
    own = library.top.SamplingParams(max_tokens=4)
    result = await reading.generate_async(inputs="The quick brown", sampling_params=own)
    assert own.end_id == 2, "the caller's object is changed"
    assert result.outputs[0].text != ""


async def test_greedy_tokens_are_those_of_transformers(any_version: Any, expected: Any) -> None:
    llm = any_version.llm()
    seen = await rig.steps(
        llm.generate_async(
            inputs=rig.PROMPT, sampling_params=any_version.sampling(12), streaming=True
        )
    )
    assert [ids for ids, _, _ in seen] == [expected[: i + 1] for i in range(12)]
    assert [reason for _, _, reason in seen] == [None] * 11 + ["length"]
    result = await llm.generate_async(inputs=rig.PROMPT, sampling_params=any_version.sampling(12))
    assert result.finished
    assert not result.aborted()
    assert result.outputs[0].token_ids == expected


async def test_unseeded_requests_draw_alike(library: Any) -> None:
    llm = library.llm()
    drawn = [
        (
            await llm.generate_async(
                inputs=rig.PROMPT, sampling_params=library.sampling(8, temperature=1.5, **seed)
            )
        )
        .outputs[0]
        .token_ids
        for seed in ({}, {}, {"seed": 0}, {"seed": 1})
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != drawn[3]


async def test_first_release_is_greedy_without_the_mixed_sampler(
    tmp_path: Path, model: Path, expected: list[int]
) -> None:
    with rig.installed(tmp_path, "1.0.0") as root:
        library = rig.Library(root, model)
        told = library.sampling(8, temperature=1.5, seed=3)
        careless, careful = library.llm(), library.llm(enable_mixed_sampler=True)
        outputs = [
            (await llm.generate_async(inputs=rig.PROMPT, sampling_params=told)).outputs[0].token_ids
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
        return (await llm.generate_async(inputs=rig.PROMPT, sampling_params=params)).outputs[0]

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
        return (
            (await llm.generate_async(inputs=rig.PROMPT, sampling_params=params))
            .outputs[0]
            .logprobs
        )

    assert await logprobs(0) == []  # 0 reads as none at all
    two = await logprobs(2)
    assert [set(map(type, each)) for each in two] == [{int}] * 3
    assert [each[token].rank for each, token in zip(two, expected, strict=False)] == [1, 1, 1]
    assert all(len(each) == 2 and max(v.logprob for v in each.values()) < 0 for each in two)


async def test_long_prompts_need_chunks(library: Any, expected: Any) -> None:
    strict = library.llm(max_num_tokens=16)
    with pytest.raises(ValueError, match=r"should not exceed max_num_tokens \(16\)"):
        strict.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling())
    chunked = library.llm(max_num_tokens=16, enable_chunked_prefill=True)
    result = await chunked.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(4))
    assert result.outputs[0].token_ids == expected[:4]
    with pytest.raises(library.errors.RequestError, match="leave no room"):
        await chunked.generate_async(inputs=[5] * 256, sampling_params=library.sampling())


async def test_salted_requests_do_not_share_their_cache(library: Any) -> None:
    llm = library.llm()
    cached = []
    for salt in (None, None, "a", "a"):
        result = await llm.generate_async(
            inputs=rig.PROMPT, sampling_params=library.sampling(2), cache_salt=salt
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
    running = llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling(200))
    await asyncio.to_thread(llm.shutdown)
    await running
    assert running.outputs[0].finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async(inputs=rig.PROMPT, sampling_params=library.sampling())
