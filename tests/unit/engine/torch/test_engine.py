"""The torch engine end to end on a tiny model: exact tokens, shared blocks, room, aborts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from serving.errors import EngineFailed, InvalidRequest, ModelError, OperatorError, Overloaded
from serving.protocol import SamplingParams
from transformers import (
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from unit.engine.torch_rig import (
    SIZES,
    generate,
    greedy,
    make_engine,
    random_prompts,
    request,
    running,
    save_model,
    settled,
)
from waiting import until

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama3-rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral-window": MistralConfig(**SIZES, sliding_window=16, head_dim=16),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2-softcap-window": Gemma2Config(
        **{**SIZES, "initializer_range": 0.1},
        head_dim=16,
        sliding_window=16,
        query_pre_attn_scalar=16,
    ),
    "gpt-oss-sinks-window": GptOssConfig(
        **SIZES, head_dim=16, sliding_window=16, num_local_experts=4, num_experts_per_tok=2
    ),
    # The second layer has no rotary positions, and scales queries by their position.
    "llama4-chunks": Llama4TextConfig(
        **SIZES,
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=4,
        no_rope_layers=[1, 0],
        attention_chunk_size=16,
        floor_scale=8,
        attn_scale=3.0,
    ),
    "gpt2": GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_equal_generate(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", FAMILIES[family])
    prompts = random_prompts([40, 3, 17, 8, 29, 33, 24, 1])
    async with running(folder, max_num_batched_tokens=24) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(NUM_TOKENS)))
        await sink.finished(*map(str, range(len(prompts))))
        # A second round finds its prefixes in the cache.
        for i, prompt in enumerate(prompts):
            engine.submit(request(f"again-{i}", prompt, greedy(NUM_TOKENS)))
        await sink.finished(*(f"again-{i}" for i in range(len(prompts))))
    expected = [generate(folder, prompt, NUM_TOKENS) for prompt in prompts]
    assert [sink.tokens[str(i)] for i in range(len(prompts))] == expected
    assert [sink.tokens[f"again-{i}"] for i in range(len(prompts))] == expected
    assert [sink.cached[f"again-{i}"] for i in range(len(prompts))] == [
        (len(prompt) - 1) // 8 * 8 for prompt in prompts
    ]


async def test_preempted_requests_finish_with_the_same_tokens(model: Path) -> None:
    prompts = random_prompts([30, 28, 31])
    options = {"max_model_len": 64, "kv_cache_tokens": 104}
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(33, logprobs=0)))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
    for i, prompt in enumerate(prompts):
        assert sink.tokens[str(i)] == generate(model, prompt, 33)
        assert [entry.token_id for entry in sink.logprobs[str(i)]] == sink.tokens[str(i)]


async def test_identical_prompts_in_one_step_share_their_blocks(model: Path) -> None:
    prompt = random_prompts([40])[0]
    async with running(model) as (engine, sink):
        for i in range(4):
            engine.submit(request(str(i), prompt, greedy(NUM_TOKENS)))
        await sink.finished("0", "1", "2", "3")
    assert [sink.cached[str(i)] for i in range(4)] == [0, 32, 32, 32]
    assert len({tuple(sink.tokens[str(i)]) for i in range(4)}) == 1


async def test_evictions_are_reported_and_take_leaves_first(model: Path) -> None:
    first, second = random_prompts([41, 90])
    async with running(model, kv_cache_tokens=128) as (engine, sink):
        engine.submit(request("a", first, greedy(1)))
        await sink.finished("a")
        told = list(sink.stored)
        engine.submit(request("b", second, greedy(1)))
        await sink.finished("b")
        evicted = [h for h in told if h not in sink.stored]
        assert len(evicted) == 1
        engine.submit(request("c", first, greedy(1)))
        await sink.finished("c")
        assert sink.cached["c"] == 32  # all but the leaf


async def test_a_stop_token_ends_a_request_and_is_no_output(model: Path) -> None:
    prompt = random_prompts([20])[0]
    expected = generate(model, prompt, NUM_TOKENS)
    stop = next(t for i, t in enumerate(expected) if i >= 3 and t not in expected[:i])
    async with running(model) as (engine, sink):
        engine.submit(request("a", prompt, greedy(NUM_TOKENS, stop_token_ids=(stop,))))
        engine.submit(
            request("b", prompt, greedy(NUM_TOKENS, stop_token_ids=(stop,), min_tokens=8))
        )
        await sink.finished("a", "b")
    assert sink.tokens["a"] == expected[: expected.index(stop)]
    assert (sink.last["a"].finish_reason, sink.last["a"].stop_token_id) == ("stop", stop)
    assert len(sink.tokens["b"]) >= 8


async def test_output_stops_at_the_context_length(model: Path) -> None:
    prompt = random_prompts([50])[0]
    async with running(model, max_model_len=64) as (engine, sink):
        engine.submit(request("a", prompt, greedy(100)))
        await sink.finished("a")
    assert len(sink.tokens["a"]) == 14
    assert sink.last["a"].finish_reason == "length"


async def test_continued_request_counts_earlier_tokens_as_output(model: Path) -> None:
    prompt = random_prompts([20])[0]
    seeded = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=7, frequency_penalty=0.5)
    async with running(model) as (engine, sink):
        engine.submit(request("whole", prompt, seeded))
        await sink.finished("whole")
        whole = sink.tokens["whole"]
        engine.submit(request("rest", prompt + whole[:5], seeded, num_prompt_tokens=20))
        await sink.finished("rest")
    assert len(whole) == NUM_TOKENS
    assert sink.tokens["rest"] == whole[5:]


async def test_aborting_frees_blocks_in_every_phase(model: Path) -> None:
    prompts = random_prompts([60, 40, 40])
    async with running(model, max_batch_size=1) as (engine, sink):
        engine.submit(request("runs", prompts[0], greedy(60)))
        engine.submit(request("waits", prompts[1], greedy(60)))
        await sink.started("runs", 2)
        engine.abort("waits")
        engine.abort("runs")
        engine.abort("unknown")
        await sink.finished("runs", "waits")
        assert {sink.last[i].finish_reason for i in ("runs", "waits")} == {"cancelled"}
        await settled(engine)
        assert engine.load().active_blocks == 0
        engine.submit(request("held", prompts[2], greedy(5), phase="prefill"))
        await sink.finished("held")
        assert engine.load().active_blocks == 5
        engine.abort("held")
        assert engine.load().active_blocks == 0
        assert engine.kv.exported("held") == 0


async def test_an_id_can_be_used_again_right_after_an_abort(model: Path) -> None:
    prompt = random_prompts([30])[0]
    async with running(model) as (engine, sink):
        engine.submit(request("a", prompt, greedy(90)))
        await sink.started("a", 2)
        engine.abort("a")
        await sink.finished("a")
        del sink.last["a"], sink.tokens["a"], sink.cached["a"]
        engine.submit(request("a", prompt, greedy(4)))
        await sink.finished("a")
    assert sink.tokens["a"] == generate(model, prompt, 4)


async def test_full_queue_refuses_and_bad_requests_are_named(model: Path) -> None:
    prompt = random_prompts([100])[0]
    async with running(model, max_batch_size=1, max_waiting=2) as (engine, sink):
        engine.submit(request("a", prompt, greedy(27)))
        await sink.started("a")
        engine.submit(request("b", prompt, greedy(1)))
        engine.submit(request("c", prompt, greedy(1)))
        with pytest.raises(Overloaded):
            engine.submit(request("d", prompt, greedy(1)))
        wrong = [
            request("e", [], greedy(1)),
            request("f", [5] * 128, greedy(1)),
            request("g", [5, 256], greedy(1)),
            request("h", [5, -1], greedy(1)),
            request("i", [5], greedy(0)),
            request("j", [5, 6], greedy(1), num_prompt_tokens=1),
            request("a", [5], greedy(1)),
        ]
        for bad in wrong:
            with pytest.raises(InvalidRequest):
                engine.submit(bad)
        await sink.finished("a", "b", "c")


async def test_a_request_expires_in_the_queue_even_while_nothing_is_computed(model: Path) -> None:
    """A prefill that nobody fetches has all blocks, so that no step comes that could look."""
    full, other = random_prompts([120, 100])
    async with running(model, kv_cache_tokens=128) as (engine, sink):
        engine.submit(request("full", full, greedy(5), phase="prefill"))
        await sink.finished("full")
        engine.submit(request("short", other, greedy(2), queue_s=0.1))
        engine.submit(request("patient", other, greedy(2), queue_s=60.0))
        engine.submit(request("forever", other[:40], greedy(2)))
        await sink.finished("short")
        error = sink.last["short"].error
        assert error is not None
        assert error.kind == "QueuedTooLong"
        assert engine.load().num_waiting == 2
        engine.check_integrity()
        assert sink.last.keys() == {"full", "short"}
        engine.kv.release("full")
        await sink.finished("patient", "forever")
        engine.submit(request("short", other, greedy(2), queue_s=9.0))  # the id is free again
        del sink.last["short"], sink.tokens["short"]
        await sink.finished("short")
        assert sink.tokens["short"] == generate(model, other, 2)


async def test_failing_step_ends_its_requests_and_the_engine_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompts([20])[0]
    async with running(model) as (engine, sink):
        runner = engine._runner
        original = runner.launch

        def fail_once(chunks: Any) -> Any:
            monkeypatch.setattr(runner, "launch", original)
            raise RuntimeError("out of luck")

        monkeypatch.setattr(runner, "launch", fail_once)
        engine.submit(request("a", prompt, greedy(4)))
        await sink.finished("a")
        assert sink.last["a"].finish_reason == "error"
        error = sink.last["a"].error
        assert error is not None
        assert (error.kind, "out of luck" in error.message) == ("EngineFailed", True)
        engine.submit(request("b", prompt, greedy(4)))
        await sink.finished("b")
    assert sink.tokens["b"] == generate(model, prompt, 4)


async def test_step_that_fails_ends_only_the_requests_that_fail_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of the step get the tokens that they would have got without it."""
    prompts = random_prompts([20, 30, 40])
    async with running(model) as (engine, sink):
        original = engine._runner.launch
        together: set[int] = set()

        def fail_with_b(chunks: Any) -> Any:
            if any(chunk.sequence.request_id == "b" for chunk in chunks):
                together.add(len(chunks))
                raise RuntimeError("out of luck")
            return original(chunks)

        monkeypatch.setattr(engine._runner, "launch", fail_with_b)
        for name, prompt in zip("abc", prompts, strict=True):
            engine.submit(request(name, prompt, greedy(6)))
        await sink.finished("a", "b", "c")
        assert min(together) == 1 < max(together), "in a step with others, and then alone"
        assert sink.last["b"].finish_reason == "error"
        assert sink.tokens["a"] == generate(model, prompts[0], 6)
        assert sink.tokens["c"] == generate(model, prompts[2], 6)
        engine.check_integrity()


async def test_device_that_computes_nothing_any_more_ends_the_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    async with running(model) as (engine, sink):
        for name in ("launch", "prove"):
            monkeypatch.setattr(engine._runner, name, broken)
        engine.submit(request("a", random_prompts([20])[0], greedy(4)))
        await sink.finished("a")
        await until(lambda: engine.health().failure)
        assert "illegal memory access" in engine.health().failure
        with pytest.raises(EngineFailed):
            engine.submit(request("b", random_prompts([20])[0], greedy(4)))


async def test_close_cancels_running_requests_and_joins_the_thread(model: Path) -> None:
    threads = threading.active_count()
    async with running(model) as (engine, sink):
        engine.submit(request("a", random_prompts([30])[0], greedy(90)))
        await sink.started("a")
        await engine.close()
        assert sink.last["a"].finish_reason == "cancelled"
        assert "torch-engine" not in {thread.name for thread in threading.enumerate()}
    assert threading.active_count() <= threads + 1  # asyncio may keep one for `to_thread`


async def test_start_names_the_key_when_the_pool_is_too_small(model: Path) -> None:
    with pytest.raises(OperatorError, match=r"engine\.kv_cache_tokens to 128"):
        async with running(model, kv_cache_tokens=120):
            pass
    with pytest.raises(OperatorError, match=r"engine\.max_model_len to 512"):
        async with running(model, max_model_len=1024):
            pass


async def test_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    with pytest.raises(ModelError):
        await engine.start(lambda *_: None)
    await engine.close()


async def test_unstated_pool_holds_a_full_batch(model: Path) -> None:
    async with running(model, kv_cache_tokens=None, max_batch_size=3) as (engine, _):
        assert 3 * 128 <= engine.spec.num_blocks * 8 <= 3 * 128 + 8
        layout = engine.spec.kv_layout
        assert layout is not None
        assert layout.block_shape == (2, 2, 8, 2, 16)


async def test_bfloat16_engine_runs(model: Path) -> None:
    async with running(model, dtype="bfloat16") as (engine, sink):
        engine.submit(request("a", random_prompts([20])[0], greedy(4)))
        await sink.finished("a")
        assert engine.spec.kv_layout is not None
        assert engine.spec.kv_layout.dtype == "bfloat16"
    assert len(sink.tokens["a"]) == 4


async def test_many_requests_at_once_leave_a_consistent_cache(model: Path) -> None:
    """Mixed prompts, aborts and a pool that forces evictions and preemptions."""
    prompts = random_prompts([5, 60, 33, 12, 48, 7, 25, 40] * 3, seed=3)
    prompts = [prompts[i % 5][:16] + p for i, p in enumerate(prompts)]
    async with running(model, kv_cache_tokens=256, max_num_batched_tokens=40) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(20)))
        for i in range(0, len(prompts), 5):
            await asyncio.sleep(0.01)
            engine.abort(str(i))
        await sink.finished(*map(str, range(len(prompts))))
    for i, prompt in enumerate(prompts):
        if sink.last[str(i)].finish_reason == "length":
            assert sink.tokens[str(i)] == generate(model, prompt, 20)
