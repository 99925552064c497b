"""Test code. What the arguments of an LLM mean for the torch engine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorrt_llm import _failures

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """`max_transfer_tokens` None: no transceiver. `timeout_s` None: held until fetched."""

    model_dir: Path
    dtype: str
    max_seq_len: int
    tokens_per_block: int
    max_tokens_in_cache: int | None
    max_batch_size: int
    max_num_tokens: int
    chunked_prefill: bool
    block_reuse: bool
    event_buffer_max_size: int
    host_cache_bytes: int
    transport: str | None
    timeout_s: float | None
    stats: bool
    max_stats: int
    perf_metrics: bool
    stream_interval: int
    guided: bool
    always_greedy: bool


def replaced(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, **changes)


def read(args: Any, model_dir: Path) -> Settings:
    """Raises what the real constructor raises for a model or sizes that it cannot serve."""
    config_file = model_dir / "config.json"
    if not config_file.exists():
        raise ValueError(f"Failed to load the model config from {model_dir}: no config.json")
    config = json.loads(config_file.read_text())
    world_size = args.tensor_parallel_size * args.pipeline_parallel_size
    if world_size > 1 and _failures.num_gpus() < world_size:
        raise RuntimeError(
            f"Only {_failures.num_gpus()} GPUs are available, but {world_size} are required."
        )
    heads = config.get("num_attention_heads", 1)
    if heads % args.tensor_parallel_size:
        raise AssertionError(
            f"num_heads {heads} must divide by tp_size {args.tensor_parallel_size}"
        )
    kv, transceiver = args.kv_cache_config, args.cache_transceiver_config
    timeout_ms = getattr(transceiver, "kv_transfer_timeout_ms", None)
    return Settings(
        model_dir=model_dir,
        dtype=_dtype(args.dtype, config),
        max_seq_len=args.max_seq_len or config["max_position_embeddings"],
        tokens_per_block=getattr(kv, "tokens_per_block", None) or 32,
        max_tokens_in_cache=kv.max_tokens,
        max_batch_size=args.max_batch_size or 2048,
        max_num_tokens=args.max_num_tokens or 8192,
        chunked_prefill=args.enable_chunked_prefill,
        block_reuse=kv.enable_block_reuse,
        event_buffer_max_size=kv.event_buffer_max_size,
        host_cache_bytes=kv.host_cache_size or 0,
        transport=_transport(transceiver),
        timeout_s=None if timeout_ms is None else timeout_ms / 1000,
        stats=getattr(args, "enable_iter_perf_stats", False),
        max_stats=args.iter_stats_max_iterations or 1000,
        perf_metrics=getattr(args, "return_perf_metrics", False),
        stream_interval=getattr(args, "stream_interval", 1),
        guided=args.guided_decoding_backend is not None,
        always_greedy=_is_always_greedy(args),
    )


def _dtype(stated: str, config: dict[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") if stated == "auto" else stated
    dtype = dtype or "float32"
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(_DTYPES)}")
    return dtype


def _is_always_greedy(args: Any) -> bool:
    """1.0 looks at a request's sampling parameters only with one of these two."""
    samplers = [getattr(args, f"enable_{name}_sampler", None) for name in ("mixed", "trtllm")]
    return samplers == [False, False]


def _transport(transceiver: Any) -> str | None:
    """UCX is UCX; what else there is goes over TCP here. Unset means no transfer."""
    if transceiver is None or transceiver.backend is None:
        return None
    return "ucx" if transceiver.backend.upper() == "UCX" else "tcp"
