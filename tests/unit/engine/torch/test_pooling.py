"""Embeddings are transformers' hidden states, however the prompt is split, cached or batched."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config
from unit.engine.torch_rig import (
    SIZES,
    embedding_of,
    greedy,
    hidden_states,
    random_prompts,
    request,
    running,
    save_model,
)

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / request.param, FAMILIES[request.param])


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_hidden_states_are_those_of_transformers(model: Path, pooling: Any) -> None:
    prompts = random_prompts([1, 2, 8, 30, 100, 128])
    async with running(model, max_num_batched_tokens=24) as (engine, sink):
        engine.submit(request("decoding", random_prompts([20], seed=5)[0], greedy(60)))
        await sink.started("decoding", 2)
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(1), pooling=pooling))
        await sink.finished("decoding", *map(str, range(len(prompts))))
    for i, prompt in enumerate(prompts):
        assert embedding_of(sink, str(i)) == pytest.approx(
            hidden_states(model, prompt, pooling), abs=2e-4, rel=1e-3
        )


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_cached_prefix_does_not_change_an_embedding(model: Path, pooling: Any) -> None:
    (prompt,) = random_prompts([50], seed=2)
    async with running(model) as (engine, sink):
        engine.submit(request("first", prompt[:41], greedy(4)))
        await sink.finished("first")
        engine.submit(request("a", prompt, greedy(1), pooling=pooling))
        await sink.finished("a")
        engine.submit(request("again", prompt, greedy(1), pooling=pooling))
        await sink.finished("again")
        assert sink.cached["again"] == (48 if pooling == "last" else 0)
        # A prompt whose last token alone is computed: in a step as if it decoded.
        engine.submit(request("one", prompt[:49], greedy(1), pooling=pooling))
        await sink.finished("one")
    for name, whole in (("a", prompt), ("again", prompt), ("one", prompt[:49])):
        assert embedding_of(sink, name) == pytest.approx(
            hidden_states(model, whole, pooling), abs=2e-4, rel=1e-3
        )


async def test_many_in_a_pool_that_is_too_small_for_all(model: Path) -> None:
    prompts = random_prompts([60] * 12, seed=4)
    options = {"kv_cache_tokens": 136, "max_num_batched_tokens": 16}
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            pooling = "mean" if i % 2 else None
            engine.submit(request(str(i), prompt, greedy(1 if pooling else 20), pooling=pooling))
        engine.submit(request("gone", prompts[0], greedy(1), pooling="mean"))
        await asyncio.sleep(0.01)
        engine.abort("gone")
        await sink.finished("gone", *map(str, range(len(prompts))))
    for i in range(1, len(prompts), 2):
        assert embedding_of(sink, str(i)) == pytest.approx(
            hidden_states(model, prompts[i], "mean"), abs=2e-4, rel=1e-3
        )
