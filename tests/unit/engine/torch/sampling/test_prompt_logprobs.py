"""Log-probabilities of the prompt: all of it, once, whatever is cached or computed beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving.engine.core.step import MAX_REPORTED_TOKENS
from serving.protocol import TokenLogprob
from transformers import AutoModelForCausalLM
from unit.engine.torch_rig import greedy, random_prompts, request, running, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


def check(model: Path, prompt: list[int], report: list[TokenLogprob], width: int) -> None:
    """Against one forward pass of transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(loaded(torch.tensor([prompt])).logits[0], -1)
    assert [entry.token_id for entry in report] == prompt[1:]
    for position, entry in enumerate(report):
        row = expected[position]
        assert entry.logprob == pytest.approx(float(row[prompt[position + 1]]), abs=1e-4)
        top = row.topk(width).indices.tolist() if width else []
        assert [token for token, _ in entry.top] == top


async def test_the_first_output_reports_every_prompt_token_but_the_first(model: Path) -> None:
    """In one chunk, in many, beside running requests, and again when the prompt is cached."""
    prompts = random_prompts([50, 33, 9, 1])
    async with running(model, max_num_batched_tokens=16) as (engine, sink):
        engine.submit(request("other", prompts[0], greedy(40)))
        for turn in "ab":
            names = [f"{turn}{i}" for i in range(len(prompts))]
            for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
                engine.submit(request(name, prompt, greedy(4, prompt_logprobs=i)))
            await sink.finished(*names)
        await sink.finished("other")
        engine.submit(request("after", prompts[0], greedy(4)))
        await sink.finished("after")
    for turn in "ab":
        for i, prompt in enumerate(prompts):
            check(model, prompt, sink.prompt_logprobs[f"{turn}{i}"], i)
            assert sink.cached[f"{turn}{i}"] == 0
            assert len(sink.tokens[f"{turn}{i}"]) == 4
    assert sink.tokens["a0"] == sink.tokens["b0"] == sink.tokens["after"]
    assert sink.cached["after"] == 48  # the detour left the cache as it was
    assert "other" not in sink.prompt_logprobs


async def test_rows_of_logits_in_a_step_are_bounded(model: Path) -> None:
    prompts = random_prompts([MAX_REPORTED_TOKENS + 44, MAX_REPORTED_TOKENS + 74])
    options = {"max_model_len": 400, "max_num_batched_tokens": 800, "kv_cache_tokens": 1024}
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(2, prompt_logprobs=1)))
        await sink.finished("0", "1")
        assert sink.num_steps >= 4  # three of prefill, where one would do, and one of decode
    for i, prompt in enumerate(prompts):
        check(model, prompt, sink.prompt_logprobs[str(i)], 1)


async def test_a_prefill_reports_prompt_logprobs_and_its_continuation_does_not(model: Path) -> None:
    [prompt] = random_prompts([20])
    sampling = greedy(5, prompt_logprobs=0)
    async with running(model) as (engine, sink):
        engine.submit(request("r", prompt, sampling, phase="prefill"))
        await sink.finished("r")
        engine.kv.release("r")
        so_far = [*prompt, *sink.tokens["r"]]
        engine.submit(request("on", so_far, sampling, num_prompt_tokens=len(prompt)))
        await sink.finished("on")
    check(model, prompt, sink.prompt_logprobs["r"], 0)
    assert "on" not in sink.prompt_logprobs


async def test_preempted_prompt_is_reported_whole(model: Path) -> None:
    """A pool too small for all: the last arrival starts again, before or after it told."""
    prompts = random_prompts([40, 40, 40])
    async with running(model, kv_cache_tokens=160, max_num_batched_tokens=16) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(50, prompt_logprobs=1)))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
    for i, prompt in enumerate(prompts):
        check(model, prompt, sink.prompt_logprobs[str(i)], 1)


async def test_blocks_of_the_prompt_in_host_memory_are_computed_again_too(model: Path) -> None:
    prompts = random_prompts([64, 100, 90, 110])
    block_bytes = 2 * 2 * 2 * 16 * 8 * 4  # layers, key and value, heads, their size, tokens, bytes
    options = {"kv_cache_tokens": 128, "host_cache_bytes": 100 * block_bytes}
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(2)))
            await sink.finished(str(i))
        assert engine.load().host_cached_blocks > 8
        engine.submit(request("r", prompts[0], greedy(2, prompt_logprobs=1)))
        engine.submit(request("hit", prompts[0], greedy(2)))
        await sink.finished("r", "hit")
    check(model, prompts[0], sink.prompt_logprobs["r"], 1)
    assert sink.cached["r"] == 0
    assert sink.cached["hit"] > 0
    assert sink.tokens["r"] == sink.tokens["hit"] == sink.tokens["0"]
