"""The peer of a throughput row: the best configuration of `transformers` continuous batching."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from serving.engine.manifest import load_manifest
from serving.engine.torch.weights.dummy import make_model
from transformers import AutoModelForCausalLM, GenerationConfig

BUDGET_S = 100.0
"""No further configuration is tried when this has passed."""
WARM_UP_TOKENS = 8


def best_rate(
    engine_dir: Path,
    device: str,
    dtype: str,
    prompts: list[list[int]],
    num_tokens: int,
    note: Callable[[str], None],
) -> tuple[float, str, dict[str, Any]]:
    """Output tokens/s of its best configuration, what that is, and what came of each.

    Same weights, same prompts, greedy, no end of sequence. Raises RuntimeError if all fail.
    """
    model = _load(engine_dir, device, dtype)
    attention = _watched_attention(model)
    tried: dict[str, Any] = {}
    started = time.monotonic()
    for name, settings in _configurations(prompts, num_tokens, device).items():
        if time.monotonic() - started > BUDGET_S:
            tried[name] = f"not tried: {BUDGET_S:.0f} s were over"
            continue
        try:
            tried[name] = round(_measure(model, settings, prompts, num_tokens), 1)
        except Exception as exc:
            tried[name] = f"{type(exc).__name__}: {str(exc)[:200]}"
        note(f"transformers continuous batching, {name}: {tried[name]}")
        if hasattr(model, "destroy_cached_continuous_batching_manager"):
            model.destroy_cached_continuous_batching_manager()
        _free(device)
    rates = {name: rate for name, rate in tried.items() if isinstance(rate, float)}
    if not rates:
        raise RuntimeError(f"transformers continuous batching does not run: {tried}")
    best = max(rates, key=lambda name: rates[name])
    name = f"transformers generate_batch, {best}, attention {next(iter(attention), None)}"
    return rates[best], name, tried


def _configurations(
    prompts: list[list[int]], num_tokens: int, device: str
) -> dict[str, dict[str, Any] | None]:
    """Its defaults first; a cache of the load's size keeps its attention masks small."""
    block_size = 256
    blocks = sum(-(-(len(prompt) + num_tokens) // block_size) + 1 for prompt in prompts)
    sized = {
        "block_size": block_size,
        "num_blocks": blocks,
        "max_batch_tokens": max(4096, len(prompts)),
    }
    if device == "cpu":  # its defaults would fill the memory that all share
        return {"sized for the load": sized}
    return {
        "defaults": None,
        "CUDA graphs": {"use_cuda_graph": True},
        "sized for the load": sized,
        "sized for the load, CUDA graphs": sized | {"use_cuda_graph": True},
    }


def _load(engine_dir: Path, device: str, dtype: str) -> Any:
    _free(device)
    torch_dtype = getattr(torch, dtype)
    dummy = load_manifest(engine_dir).dummy_weights
    if dummy is not None:
        target = torch.device(device)
        model = make_model(engine_dir, dummy.seed, target, torch_dtype, attention="sdpa")
        return model.eval()
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(engine_dir, dtype=torch_dtype).to(device).eval()


def _watched_attention(model: Any) -> list[str]:
    """Its first entry will be the attention that it chooses: afterwards it restores the old one."""
    chosen: list[str] = []
    original = model.set_attn_implementation

    def noted(name: Any, *args: Any, **more: Any) -> Any:
        chosen.append(str(name))
        return original(name, *args, **more)

    model.set_attn_implementation = noted
    return chosen


def _measure(
    model: Any, settings: dict[str, Any] | None, prompts: list[list[int]], num_tokens: int
) -> float:
    generation = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1)
    generation.pad_token_id = 0
    how: dict[str, Any] = {"generation_config": generation, "persistent_manager": True}
    if settings is not None:
        from transformers.generation import ContinuousBatchingConfig

        how["continuous_batching_config"] = ContinuousBatchingConfig(**settings)
    # Other prompts of the same lengths: what it caches must not help later.
    others = [[token ^ 1 for token in prompt] for prompt in prompts]
    model.generate_batch(others, max_new_tokens=WARM_UP_TOKENS, **how)
    started = time.perf_counter()
    results = model.generate_batch(prompts, max_new_tokens=num_tokens, **how)
    wall_s = time.perf_counter() - started
    lengths = [len(result.generated_tokens) for result in results.values()]
    if lengths != [num_tokens] * len(prompts):
        raise RuntimeError(f"{len(prompts)} x {num_tokens} tokens were asked for, got {lengths}")
    return sum(lengths) / wall_s


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
