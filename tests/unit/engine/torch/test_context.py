"""The context that an engine offers when `engine.max_model_len` is `auto`, and its pool's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from serving.config import EngineConfig
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.runner import ModelRunner
from serving.engine.torch.weights.context import model_max_len
from serving.errors import OperatorError
from serving.kv_layout import KvLayout
from transformers import LlamaConfig, PreTrainedConfig
from unit.engine.torch_rig import (
    SIZES,
    generate,
    greedy,
    random_prompts,
    request,
    running,
    save_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "llama")


async def test_auto_is_the_models_own_limit(model: Path) -> None:
    async with running(model, max_model_len="auto", kv_cache_tokens=4096) as (engine, sink):
        assert engine.spec.max_model_len == SIZES["max_position_embeddings"] == 512
        (prompt,) = random_prompts([500])
        engine.submit(request("a", prompt, greedy(12)))
        await sink.finished("a")
    assert sink.tokens["a"] == generate(model, prompt, 12)


async def test_auto_is_no_more_than_the_pool_holds(model: Path) -> None:
    async with running(model, max_model_len="auto", kv_cache_tokens=100) as (engine, sink):
        assert engine.spec.max_model_len == 96  # whole blocks of 8
        (prompt,) = random_prompts([90])
        engine.submit(request("a", prompt, greedy(50)))
        await sink.finished("a")
    assert len(sink.tokens["a"]) == 6
    assert sink.last["a"].finish_reason == "length"


async def test_pool_of_unstated_size_holds_a_full_batch_of_the_models_limit(model: Path) -> None:
    options = {"max_model_len": "auto", "kv_cache_tokens": None, "max_batch_size": 2}
    async with running(model, **options) as (engine, _):
        assert 2 * 512 <= engine.spec.num_blocks * 8 <= 2 * 512 + 8


def test_workers_of_one_machine_share_its_memory(model: Path) -> None:
    config = EngineConfig(dtype="float32", max_batch_size=10**9)
    runner = ModelRunner(model, config, "cpu", 64)
    alone, shared = runner.free_for_kv(1), runner.free_for_kv(4)
    assert shared < alone <= psutil.virtual_memory().total / 2
    assert alone / shared == pytest.approx(4, rel=0.25)  # others use the machine meanwhile


async def test_pool_beyond_the_memory_is_refused_at_the_start(model: Path) -> None:
    with pytest.raises(OperatorError, match="does not fit in memory"):
        async with running(model, kv_cache_tokens=10**11):
            pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_pool_takes_memory_as_it_fills(dtype: str) -> None:
    layout = KvLayout.uniform(4, 4, 64, 16, dtype)
    num_blocks = 2**28 // layout.block_bytes
    process = psutil.Process()
    before = process.memory_info().rss
    pool = KvPool(layout, num_blocks, "cpu")
    assert process.memory_info().rss - before < 2**24
    rows = torch.arange(64)
    pool.write_tokens(rows, pool.rounded(torch.ones(64, 4, 64)))
    assert pool.read_tokens(rows, torch.float32).min() == 1
    assert pool.read_blocks(torch.tensor([9]), torch.float32).abs().max() == 0
    assert process.memory_info().rss - before < 2**25


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        # Published with the limit before scaling, as Qwen 2.5 describes it.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        # Published with the limit after scaling.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            512,
        ),
    ],
)
def test_models_limit_is_meant_after_scaling(rope: Any, limit: int) -> None:
    config = LlamaConfig(
        **SIZES, **({"rope_parameters": {"rope_theta": 1e4, **rope}} if rope else {})
    )
    assert model_max_len(config) == limit


def test_config_without_a_limit_has_none() -> None:
    assert model_max_len(PreTrainedConfig()) is None
