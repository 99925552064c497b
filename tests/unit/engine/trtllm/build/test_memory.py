"""The estimate of GPU memory: what it counts, and which number it says to lower."""

from __future__ import annotations

import re
from typing import Any

import pytest
from serving.engine.trtllm.build.checkpoint import Checkpoint
from serving.engine.trtllm.build.memory import (
    estimate,
    longest_context,
    num_graphs,
    require_memory,
)
from serving.engine.trtllm.build.quantization import Quantization
from serving.engine.trtllm.build.target import Parallelism
from serving.errors import ConfigError, OperatorError
from unit.engine.trtllm.build.checkpoints import GB, checkpoint, config


def require(
    memory_bytes: int, spread: Parallelism | None = None, role: Any = "agg", **engine: Any
) -> list[str]:
    found = engine.pop("checkpoint", checkpoint())
    return require_memory(
        found,
        config(**engine),
        {role: spread or Parallelism()},
        dtype="bfloat16",
        memory_bytes=memory_bytes,
    )


def test_kv_of_a_token_is_that_of_the_model() -> None:
    found = estimate(checkpoint(), config(), "agg", Parallelism(), "bfloat16")
    assert found.kv_token == 32 * 2 * 8 * 128 * 2  # 131 kB for Llama 3 8B
    assert found.weights == 16 * GB
    assert found.buffer_token == 0


@pytest.mark.parametrize(
    ("spread", "share"),
    [((2, 1), 2), ((8, 1), 8), ((16, 1), 8), ((1, 2), 2), ((2, 4), 8)],
)
def test_kv_is_divided_down_to_one_head(spread: tuple[int, int], share: int) -> None:
    whole = estimate(checkpoint(), config(), "agg", Parallelism(), "bfloat16")
    part = estimate(checkpoint(), config(), "agg", Parallelism(*spread), "bfloat16")
    assert part.kv_token == whole.kv_token / share
    assert part.weights == whole.weights // Parallelism(*spread).num_gpus


def test_latent_kv_is_on_every_gpu() -> None:
    found = estimate(
        checkpoint(num_kv_heads=0, kv_width=576), config(), "agg", Parallelism(8), "bfloat16"
    )
    assert found.kv_token == 32 * 576 * 2


def test_kv_dtype_comes_from_config_or_checkpoint() -> None:
    def kv_token(found: Checkpoint, **settings: Any) -> float:
        made = config(tensorrt_llm=settings)
        return estimate(found, made, "agg", Parallelism(), "bfloat16").kv_token

    plain = kv_token(checkpoint())
    quantized = checkpoint(quantization=Quantization("FP8", "modelopt", "FP8"))
    assert kv_token(checkpoint(), kv_cache_dtype="fp8") == plain / 2
    assert kv_token(quantized) == plain / 2
    assert kv_token(checkpoint(), kv_cache_dtype="nvfp4") < plain / 3


def test_roles_that_move_kv_have_buffers_and_prefill_no_graphs() -> None:
    roles = {
        role: estimate(checkpoint(), config(), role, Parallelism(), "bfloat16")  # type: ignore[arg-type]
        for role in ("agg", "prefill", "decode")
    }
    assert roles["prefill"].buffer_token == roles["decode"].buffer_token > 0
    assert roles["prefill"].graphs == 0 < roles["decode"].graphs


def test_built_engines_keep_logits_of_some_steps() -> None:
    """525 MB for 128 requests and this vocabulary: a user of a small GPU has to know."""
    plain, built = (
        estimate(
            checkpoint(), config(flow=flow, max_batch_size=128), "agg", Parallelism(), "bfloat16"
        )
        for flow in ("pytorch", "trtllm-build")
    )
    assert built.activations - plain.activations == 8 * 128 * 128256 * 4


def test_graphs_are_those_of_the_default_batch_sizes() -> None:
    assert [num_graphs(n) for n in (1, 4, 8, 64, 500)] == [1, 3, 4, 11, 19]


def test_fitting_engine_reports_its_tokens_of_kv() -> None:
    [line] = require(80 * GB)
    tokens = float(re.search(r"about ([\d.e+]+) tokens", line)[1])  # type: ignore[index]
    assert 300_000 < tokens < 0.85 * 64 * GB / 131072
    assert "tight" not in line


def test_unknown_memory_is_said_and_not_guessed() -> None:
    [line] = require(0, max_model_len=131072)
    assert "not known here" in line


def test_too_long_context_names_the_length_that_fits() -> None:
    with pytest.raises(OperatorError) as caught:
        require(24 * GB, role="decode", max_model_len=131072)
    lowered = int(re.search(r"engine\.max_model_len` to (\d+)", caught.value.remedy)[1])  # type: ignore[index]
    assert lowered % 16 == 0
    assert 1000 < lowered < 131072
    require(24 * GB, role="decode", max_model_len=lowered)
    with pytest.raises(OperatorError):
        require(24 * GB, role="decode", max_model_len=lowered + 16)


def test_auto_context_is_the_longest_that_the_checks_accept() -> None:
    def auto(memory_bytes: int, role: Any = "decode", **engine: Any) -> int:
        return longest_context(
            checkpoint(),
            config(max_model_len="auto", **engine),
            {role: Parallelism()},
            dtype="bfloat16",
            memory_bytes=memory_bytes,
        )

    whole = checkpoint().model_max_len
    assert auto(0) == auto(400 * GB) == whole
    assert auto(400 * GB, kv_cache_tokens=4096) == 4096
    bounded = auto(24 * GB)
    assert bounded % 16 == 0
    assert 1000 < bounded < whole
    require(24 * GB, role="decode", max_model_len=bounded)
    with pytest.raises(OperatorError):
        require(24 * GB, role="decode", max_model_len=bounded + 16)
    with pytest.raises(OperatorError, match="GPUs with more memory"):
        require(10**9, max_model_len=auto(10**9))


def test_too_many_batched_tokens_name_the_number_that_fits() -> None:
    with pytest.raises(OperatorError) as caught:
        require(20 * GB, max_num_batched_tokens=200_000)
    lowered = int(re.search(r"max_num_batched_tokens` to (\d+)", caught.value.remedy)[1])  # type: ignore[index]
    assert 0 < lowered < 200_000
    require(20 * GB, max_num_batched_tokens=lowered)


def test_weights_beyond_the_gpu_name_the_number_of_gpus() -> None:
    large = checkpoint(weight_bytes=140 * GB)
    with pytest.raises(OperatorError) as caught:
        require(80 * GB, role="decode", checkpoint=large)
    assert "workers.tensor_parallel`: {decode: 2}" in caught.value.remedy
    require(80 * GB, Parallelism(2), role="decode", checkpoint=large)


def test_gpu_too_small_for_the_runtime_is_refused() -> None:
    with pytest.raises(OperatorError) as caught:
        require(10**9)
    assert "GPUs with more memory" in caught.value.remedy


def test_pool_must_hold_one_request() -> None:
    with pytest.raises(ConfigError) as caught:
        require(80 * GB, kv_cache_tokens=1024, max_model_len=2048)
    assert caught.value.key == "engine.kv_cache_tokens"


def test_little_room_is_a_warning_that_names_the_batch() -> None:
    [line] = require(21 * GB, max_batch_size=128, max_model_len=4096)
    assert "lower engine.max_batch_size" in line
