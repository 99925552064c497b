"""The CUDA path's kernels, layer rewrite and bookkeeping, with Triton's interpreter in place of a GPU.

What only a GPU can show (graphs, streams, FlashAttention, speed) is in `tests/gpu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install -e '.[test]'")

from serving.engine.torch.cuda.kernels.decode_attention import paged_decode
from serving.engine.torch.cuda.runner import CudaRunner
from serving.protocol import Guide, SamplingParams
from transformers import (
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Qwen3Config,
    SmolLM3Config,
)
from unit.engine.interpreted_cuda import InterpretedRunner
from unit.engine.interpreted_cuda import no_gpu as no_gpu
from unit.engine.torch_rig import (
    SIZES,
    Sink,
    embedding_of,
    generate,
    greedy,
    hidden_states,
    random_prompts,
    request,
    running,
    save_model,
)
from unit.frontend.fakes import write_tokenizer

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu has the same on the GPU that is here"
)

NUM_TOKENS = 3
HEAD_DIM = {"head_dim": 16}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# (config, modules replaced of each kind); what is missing there runs as transformers wrote it.
MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (LlamaConfig(**SIZES), {"norms": 5, "attentions": 2, "MLPs": 2, "layers": 2}),
    "qwen3": (
        Qwen3Config(**SIZES, **HEAD_DIM),
        {"norms": 9, "attentions": 2, "MLPs": 2, "layers": 2},
    ),
    "gemma2": (
        Gemma2Config(**SIZES, **HEAD_DIM, **ALTERNATING),
        {"norms": 9, "attentions": 2, "MLPs": 2},
    ),
    "granite scales its residual": (
        GraniteConfig(**SIZES, residual_multiplier=0.5),
        {"norms": 5, "attentions": 2, "MLPs": 2},
    ),
    "smollm3 rotates not every layer": (
        SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
        {"norms": 9, "attentions": 3, "MLPs": 4, "layers": 4},
    ),
    "gpt_oss has sinks": (
        GptOssConfig(
            **SIZES,
            **HEAD_DIM,
            **ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        {"norms": 5},
    ),
    "llama4 attends in chunks": (
        Llama4TextConfig(
            **SIZES,
            **HEAD_DIM,
            intermediate_size_mlp=128,
            num_local_experts=4,
            no_rope_layers=[1, 0],
            attention_chunk_size=8,
            floor_scale=8,
            attn_scale=3.0,
        ),
        {"norms": 5},
    ),
}


@pytest.mark.parametrize(("config", "replaced"), MODELS.values(), ids=MODELS.keys())
async def test_tokens_equal_generate_whichever_layers_are_rewritten(
    config: Any, replaced: dict[str, int], tmp_path: Path, no_gpu: None
) -> None:
    """Chunks, a prefix hit, and decodes beside prefill."""
    model = save_model(tmp_path, config)
    prompts = random_prompts([19, 5])
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    async with running(model, runner_class=InterpretedRunner, max_num_batched_tokens=12) as (
        engine,
        sink,
    ):
        for index, prompt in enumerate(prompts):
            engine.submit(request(f"a{index}", prompt, greedy(NUM_TOKENS)))
        await sink.finished("a0", "a1")
        engine.submit(request("b0", prompts[0], greedy(NUM_TOKENS)))
        await sink.finished("b0")
        runner = engine._runner
        assert isinstance(runner, CudaRunner)
        assert dict(runner.rewrites.replaced) == replaced
    assert [sink.tokens["a0"], sink.tokens["a1"]] == expected
    assert (sink.tokens["b0"], sink.cached["b0"]) == (expected[0], 16)


async def test_a_stop_token_drops_the_step_that_was_launched_ahead(
    tmp_path: Path, no_gpu: None
) -> None:
    model = save_model(tmp_path)
    [prompt] = random_prompts([9])
    tokens = generate(model, prompt, 8)
    stop = next(i for i in range(3, 8) if tokens[i] not in tokens[:i])
    sampling = greedy(8, stop_token_ids=(tokens[stop],))
    async with running(model, runner_class=InterpretedRunner) as (engine, sink):
        engine.submit(request("stops", prompt, sampling))
        engine.submit(request("goes on", prompt, greedy(8)))
        await sink.finished("stops", "goes on")
    assert (sink.tokens["stops"], sink.last["stops"].finish_reason) == (tokens[:stop], "stop")
    assert sink.tokens["goes on"] == tokens


async def test_penalties_see_every_token_although_steps_are_launched_ahead(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path)
    [prompt] = random_prompts([9])
    sampling = greedy(8, frequency_penalty=1.5)
    async with running(model, runner_class=InterpretedRunner) as (engine, sink):
        engine.submit(request("r", prompt, sampling))
        engine.submit(request("beside", prompt[:5], greedy(8)))
        await sink.finished("r", "beside")
    monkeypatch.undo()
    async with running(model) as (engine, peer):
        engine.submit(request("r", prompt, sampling))
        await peer.finished("r")
    assert sink.tokens["r"] == peer.tokens["r"]


async def test_guides_and_prompt_logprobs_beside_rows_that_run_ahead(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same from the CPU path; chunks of one token are among those that are reported."""
    write_tokenizer(tmp_path)
    model = save_model(tmp_path, LlamaConfig(**{**SIZES, "vocab_size": 320}))
    prompts = random_prompts([9, 14, 5])
    asked = [
        SamplingParams(30, seed=1, guide=Guide("regex", "[ab]{4}-[0-9]{3}"), stop_token_ids=(1,)),
        greedy(5, prompt_logprobs=2),
        SamplingParams(9, seed=2, top_p=0.9, logit_bias=((7, 2.0),), logprobs=1),
    ]

    async def answers(**runner: Any) -> Sink:
        async with running(model, **runner, max_num_batched_tokens=9) as (engine, sink):
            for i, (prompt, sampling) in enumerate(zip(prompts, asked, strict=True)):
                engine.submit(request(str(i), prompt, sampling))
            await sink.finished("0", "1", "2")
        return sink

    ours = await answers(runner_class=InterpretedRunner)
    monkeypatch.undo()
    peer = await answers()
    assert ours.tokens == peer.tokens
    assert ours.last["0"].finish_reason == "stop"
    told, expected = ours.prompt_logprobs["1"], peer.prompt_logprobs["1"]
    assert [entry.token_id for entry in told] == prompts[1][1:]
    for one, other in zip(told, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_embeddings_are_transformers_hidden_states(
    tmp_path: Path, no_gpu: None, pooling: Any
) -> None:
    """Also of a prompt of which only the last token is computed, as if it decoded."""
    model = save_model(tmp_path)
    (prompt,) = random_prompts([21])
    options = {"max_model_len": 32, "max_num_batched_tokens": 16}
    async with running(model, runner_class=InterpretedRunner, **options) as (engine, sink):
        for name, length in (("long", 21), ("hit", 17)):
            engine.submit(request(name, prompt[:length], greedy(1), pooling=pooling))
            await sink.finished(name)
    for name, length in (("long", 21), ("hit", 17)):
        expected = hidden_states(model, prompt[:length], pooling)
        assert embedding_of(sink, name) == pytest.approx(expected, abs=2e-4, rel=1e-3)


async def test_preemption_waits_for_the_step_under_way(tmp_path: Path, no_gpu: None) -> None:
    """Three sequences grow beyond a pool that holds two of them whole."""
    model = save_model(tmp_path)
    prompts = random_prompts([14, 14, 14])
    expected = [generate(model, prompt, 17) for prompt in prompts]
    options = {"kv_cache_tokens": 72, "max_model_len": 32, "max_num_batched_tokens": 48}
    async with running(model, runner_class=InterpretedRunner, **options) as (engine, sink):
        for index, prompt in enumerate(prompts):
            engine.submit(request(str(index), prompt, greedy(17)))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
    assert [sink.tokens[str(index)] for index in range(3)] == expected


async def test_evicted_blocks_come_back_although_steps_are_launched_ahead(
    tmp_path: Path, no_gpu: None
) -> None:
    """Two prompts, of which the pool holds one: what one step copies, the next one reads."""
    model = save_model(tmp_path, LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    prompts = random_prompts([18, 21])
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    options = {"kv_cache_tokens": 32, "max_model_len": 32, "host_cache_bytes": 2**20}
    async with running(
        model, runner_class=InterpretedRunner, max_num_batched_tokens=32, **options
    ) as (
        engine,
        sink,
    ):
        for turn in "ab":
            names = [f"{turn}{index}" for index in range(2)]
            for name, prompt in zip(names, prompts, strict=True):
                engine.submit(request(name, prompt, greedy(NUM_TOKENS)))
            await sink.finished(*names)
            assert [sink.tokens[name] for name in names] == expected
        assert engine.load().onloaded_blocks > 0
    assert [sink.cached[f"b{index}"] for index in range(2)] == [16, 16]


async def test_narrow_kv_is_written_and_read_by_the_kernels(
    tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the CPU path, whose KV is as narrow; cold, after a prefix, and while decoding."""
    model = save_model(tmp_path, LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    [prompt] = random_prompts([13])
    sampling = greedy(2, logprobs=20)

    async def logprobs(**runner: Any) -> list[dict[int, float]]:
        async with running(
            model, **runner, kv_cache_dtype="bfloat16", max_num_batched_tokens=8
        ) as both:
            engine, sink = both
            for name in ("cold", "again"):
                engine.submit(request(name, prompt, sampling))
                await sink.finished(name)
            assert sink.cached["again"] == 8
            return [dict(e.top) for name in ("cold", "again") for e in sink.logprobs[name]]

    ours = await logprobs(runner_class=InterpretedRunner)
    monkeypatch.undo()
    for one, other in zip(ours, await logprobs(), strict=True):
        shared = one.keys() & other.keys()
        assert len(shared) >= 15
        # Triton's interpreter truncates where the GPU and torch round.
        assert max(abs(one[token] - other[token]) for token in shared) < 0.1


def test_decode_attention_over_windows_chunks_softcaps_sinks_and_splits() -> None:
    """Against attention written out, one sequence at a time; a row of length 0 gives zeros."""
    generator = torch.Generator().manual_seed(0)
    num_blocks, layers, size, kv_heads, heads, dim = 20, 2, 8, 2, 6, 24
    pool = torch.randn((num_blocks, layers, 2, size, kv_heads, dim), generator=generator)
    lengths, slots = [37, 1, 0, 100], [3, 0, 1, 5]
    tables = torch.zeros((6, 14), dtype=torch.int32)
    for slot in slots:
        tables[slot] = torch.randperm(num_blocks - 1, generator=generator)[:14].int() + 1
    query = torch.randn((4, heads, dim), generator=generator)
    sinks = torch.randn(heads, generator=generator)
    cases: list[tuple[int | None, float | None, torch.Tensor | None, int]] = [
        (None, None, None, 1),
        (20, None, None, 3),
        (None, 5.0, sinks, 8),
        (7, None, sinks, 3),
    ]
    chunked = [(None, 1), (20, 3), (37, 2), (36, 8), (100, 1)]
    for window, softcap, sink, splits, chunk in [
        *((*case, None) for case in cases),
        *((None, None, None, splits, chunk) for chunk, splits in chunked),
    ]:
        out = paged_decode(
            query,
            pool,
            1,
            tables,
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            splits=splits,
            scale=0.2,
            window=window,
            chunk=chunk,
            softcap=softcap,
            sinks=sink,
        )
        for row, length in enumerate(lengths):
            kv = pool[tables[slots[row]].long(), 1].transpose(0, 1).reshape(2, -1, kv_heads, dim)
            key, value = kv[:, :length].repeat_interleave(heads // kv_heads, dim=2)
            scores = torch.einsum("hd,nhd->hn", query[row], key) * 0.2
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if window is not None:
                scores[:, : max(0, length - window)] = -torch.inf
            if chunk is not None:
                scores[:, : max(0, length - 1) // chunk * chunk] = -torch.inf
            if sink is not None:
                scores = torch.cat([scores, sink[:, None]], dim=1)
            weights = scores.softmax(-1)[:, :length] if length else scores[:, :0]
            expected = torch.einsum("hn,nhd->hd", weights, value)
            torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-4)
