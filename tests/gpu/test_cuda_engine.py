"""The torch engine on a real GPU: same tokens, exchangeable blocks, bfloat16 close to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving.engine.torch.kv.pool import KvPool
from serving.kv_layout import KvLayout
from serving.protocol import KvTransferParams
from transformers import AutoModelForCausalLM
from unit.engine.torch_rig import (
    embedding_of,
    generate,
    greedy,
    hidden_states,
    random_prompts,
    request,
    running,
    save_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def test_greedy_tokens_on_cuda_equal_generate(model: Path) -> None:
    """8 at a time, in chunks, and again with prefix hits."""
    prompts = random_prompts([5, 40, 17, 64, 33, 8, 90, 21])
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    async with running(model, device="cuda", max_num_batched_tokens=32) as (engine, sink):
        for turn in "ab":
            for index, prompt in enumerate(prompts):
                engine.submit(request(f"{turn}{index}", prompt, greedy(NUM_TOKENS)))
            await sink.finished(*(f"{turn}{index}" for index in range(len(prompts))))
            assert [sink.tokens[f"{turn}{i}"] for i in range(len(prompts))] == expected
        assert sink.cached["b6"] >= 80


async def test_blocks_of_one_gpu_engine_continue_in_another(model: Path) -> None:
    [prompt] = random_prompts([50], seed=1)
    expected = generate(model, prompt, NUM_TOKENS)
    async with (
        running(model, device="cuda") as (source, source_sink),
        running(model, device="cuda") as (target, target_sink),
    ):
        source.submit(request("r", prompt, greedy(NUM_TOKENS), phase="prefill"))
        await source_sink.finished("r")
        layout = source.spec.kv_layout
        assert layout is not None
        num_blocks = source.kv.exported("r")
        params = KvTransferParams(
            "prefill-0", 1, "", "r", "", len(prompt), num_blocks, layout.fingerprint
        )
        tokens = [*prompt, *source_sink.tokens["r"]]
        decode = request(
            "r",
            tokens,
            greedy(NUM_TOKENS),
            num_prompt_tokens=len(prompt),
            phase="decode",
            kv_transfer_params=params,
        )
        staging = np.empty(num_blocks * layout.block_bytes, dtype=np.uint8)
        async with target.kv.reserve(decode) as reservation:
            source.kv.read("r", 0, staging)
            reservation.write(0, staging)
            reservation.commit()
        source.kv.release("r")
        await target_sink.finished("r")
        assert source_sink.tokens["r"] + target_sink.tokens["r"] == expected


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_embeddings_are_transformers_hidden_states(model: Path, pooling: Any) -> None:
    """Beside a request that decodes, and of prompts of which one token is left to compute."""
    (prompt,) = random_prompts([90], seed=3)
    lengths = [90, 81, 3]
    async with running(model, device="cuda", max_num_batched_tokens=32) as (engine, sink):
        engine.submit(request("decoding", random_prompts([9])[0], greedy(80)))
        await sink.started("decoding", 2)
        for length in lengths:
            engine.submit(request(str(length), prompt[:length], greedy(1), pooling=pooling))
            await sink.finished(str(length))
    for length in lengths:
        expected = hidden_states(model, prompt[:length], pooling)
        assert embedding_of(sink, str(length)) == pytest.approx(expected, abs=2e-3, rel=1e-2)


async def test_bfloat16_is_as_close_to_float32_as_transformers_is(model: Path) -> None:
    """Log-probabilities of 20 tokens after a prompt, against `transformers` in both dtypes.

    bfloat16 rounds either way differently, hence the factor; a wrong mask, scale or position
    costs whole nats.
    """
    [prompt] = random_prompts([48], seed=2)
    async with running(model, device="cuda", dtype="bfloat16") as (engine, sink):
        engine.submit(request("r", prompt, greedy(1, logprobs=20)))
        await sink.finished("r")
        ours = dict(sink.logprobs["r"][0].top)
    exact, rounded = (next_logprobs(model, prompt, dtype) for dtype in ("float32", "bfloat16"))
    error = max(abs(ours[token] - exact[token]) for token in ours)
    peer_error = max(abs(rounded[token] - exact[token]) for token in ours)
    assert error <= 2 * peer_error + 0.05


async def test_evicted_blocks_come_back_from_pinned_memory(model: Path) -> None:
    """The pool holds one or two of five prompts; copies run between the steps that need them."""
    prompts = random_prompts([40, 70, 61, 33, 90])
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    options = {"device": "cuda", "kv_cache_tokens": 128, "host_cache_bytes": 2**20}
    async with running(model, **options) as (engine, sink):
        for turn in "abc":
            for i, prompt in enumerate(prompts):
                engine.submit(request(f"{turn}{i}", prompt, greedy(NUM_TOKENS)))
            await sink.finished(*(f"{turn}{i}" for i in range(len(prompts))))
            assert [sink.tokens[f"{turn}{i}"] for i in range(len(prompts))] == expected
        if engine.load().num_host_blocks == 0:
            pytest.skip("this GPU computes the tiny model faster than it copies its blocks")
        assert engine.load().onloaded_blocks > 0
        assert [sink.cached[f"c{i}"] for i in range(len(prompts))] == [
            (len(prompt) - 1) // 8 * 8 for prompt in prompts
        ]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float8_e4m3fn", 1.5)])
async def test_narrow_kv_stays_close(model: Path, dtype: str, tolerance: float) -> None:
    """Float32 weights; the log-probabilities after a prompt, cold and after a prefix hit."""
    [prompt] = random_prompts([60], seed=2)
    exact = next_logprobs(model, prompt, "float32")
    async with running(model, device="cuda", kv_cache_dtype=dtype) as (engine, sink):
        for name in ("cold", "again"):
            engine.submit(request(name, prompt, greedy(NUM_TOKENS, logprobs=20)))
            await sink.finished(name)
            ours = dict(sink.logprobs[name][0].top)
            assert max(abs(ours[token] - exact[token]) for token in ours) < tolerance
        assert sink.cached["again"] == 56
        assert engine.spec.kv_layout is not None
        assert engine.spec.kv_layout.dtype == dtype


def test_values_beyond_float8_saturate() -> None:
    from serving.engine.torch.cuda.kernels.rotary import rotate_and_store

    pool = KvPool(KvLayout.uniform(1, 1, 16, 8, "float8_e4m3fn"), 2, "cuda")
    qkv = torch.zeros(1, 3, 16, device="cuda", dtype=torch.bfloat16)  # query, key, value
    qkv[0, 1], qkv[0, 2] = 1e4, -1e4
    rows = torch.tensor([8], dtype=torch.int32, device="cuda")  # the first token of block 1
    rotate_and_store(qkv, pool.tensor, rows, 0, num_q_heads=1)
    written = pool.tensor[1, 0, :, 0].float().cpu()
    assert written[0].unique().tolist() == [448.0]
    assert written[1].unique().tolist() == [-448.0]


def next_logprobs(model: Path, prompt: list[int], dtype: str) -> list[float]:
    """What `transformers` says comes next, over the whole vocabulary."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to("cuda")
    with torch.inference_mode():
        logits = loaded(torch.tensor([prompt], device="cuda")).logits[0, -1].float()
    logprobs: list[float] = logits.log_softmax(-1).tolist()
    return logprobs
