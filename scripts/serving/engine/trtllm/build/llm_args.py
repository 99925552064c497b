"""The arguments of TensorRT-LLM's `LLM` for one role, as YAML with the reason for each. Pure.

Only what a version knows is written; `_SINCE` and `_UNTIL` hold what changed between versions, as
far as public snapshots of its `llm_args.py` show it. What a person adds under
`tensorrt_llm.llm_args` is merged last, and listed under `_required`: the worker refuses to start
when its version lacks one of those, and drops others that a pre-release does not have yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from serving.config import Config
from serving.engine.manifest import Flow
from serving.engine.trtllm.build.target import Parallelism
from serving.engine.trtllm.versions import Version
from serving.errors import ConfigError
from serving.protocol import Role

Arguments = dict[str, Any]

REQUIRED = "_required"
"""The YAML's list of dotted argument names that must not be dropped."""

DEFAULT_TOKENS_PER_BLOCK = 32
"""Where `kv_cache_config.tokens_per_block` does not exist, before 1.1, blocks have this size."""

_SINCE: Mapping[str, tuple[int, int]] = {
    "kv_cache_config.tokens_per_block": (1, 1),
    "cache_transceiver_config.kv_transfer_timeout_ms": (1, 2),
    "cache_transceiver_config.transceiver_runtime": (1, 3),
    "return_perf_metrics": (1, 1),
}
_UNTIL: Mapping[str, tuple[int, int]] = {"enable_mixed_sampler": (1, 0)}
"""The first, and the last, release line with an argument; those not named are in all of them."""

_TORCH_ONLY = {
    "disable_overlap_scheduler",
    "cuda_graph_config",
    "enable_iter_perf_stats",
    "enable_mixed_sampler",
    "kv_cache_config.dtype",
}
"""Arguments that the TensorRT backend does not have, or asserts to be untouched."""

_OWNED: Mapping[str, str] = {
    "model": "model.id",
    "tensor_parallel_size": "workers.tensor_parallel",
    "pipeline_parallel_size": "workers.pipeline_parallel",
    "max_seq_len": "engine.max_model_len",
    "kv_cache_config.tokens_per_block": "engine.block_size",
}
"""Arguments that others here rely on, and the config key that decides them."""

_REASONS: Mapping[str, str] = {
    "model": "The checkpoint, relative to this file.",
    "dtype": "Weights and activations; `auto` leaves it to a quantized checkpoint.",
    "trust_remote_code": "Code that came with a model is never run.",
    "skip_tokenizer_init": "Requests are token ids; only guided decoding needs a tokenizer.",
    "guided_decoding_backend": "Enforces schemas and grammars.",
    "max_seq_len": "engine.max_model_len: prompt and completion.",
    "max_input_len": "Else prompts of more than 1024 tokens may be refused.",
    "max_num_tokens": "engine.max_num_batched_tokens, and room for a token of each request.",
    "enable_chunked_prefill": "Without it a prompt longer than max_num_tokens is refused.",
    "kv_cache_config.enable_block_reuse": "Prefix cache. Without it there are no KV events either.",
    "kv_cache_config.event_buffer_max_size": "0, its default, means no KV events, and so no "
    "routing by cache. Events that overflow it are lost.",
    "kv_cache_config.tokens_per_block": "engine.block_size: routers hash blocks of this size.",
    "kv_cache_config.free_gpu_memory_fraction": "Of what is free beside the weights. Transfer "
    "buffers and CUDA graphs are taken from the rest.",
    "kv_cache_config.max_tokens": "engine.kv_cache_tokens; the smaller of the two limits counts.",
    "kv_cache_config.host_cache_size": "Bytes of host memory for evicted blocks.",
    "scheduler_config.capacity_scheduler_policy": "A request is admitted only when its KV fits to "
    "the end. Blocks evicted before they were sent leave decode waiting (NVIDIA/TensorRT-LLM#12542).",
    "disable_overlap_scheduler": "The library's guide to disaggregated serving keeps overlapped "
    "steps off in context workers, which hand a request on after its first token.",
    "cuda_graph_config": "Graphs serve steps that only decode, and this worker has none.",
    "cache_transceiver_config": "Unset, its default, KV never moves and decode waits forever.",
    "cache_transceiver_config.backend": "Named: DEFAULT follows TRTLLM_USE_*_KVCACHE variables, "
    "and two workers that differ never meet.",
    "cache_transceiver_config.transceiver_runtime": "With `auto` the model decides which one is "
    "used. Both ends must use the same, and UCX exists in this one only.",
    "cache_transceiver_config.max_tokens_in_buffer": "At least the longest prompt: for a "
    "longer one, buffers are allocated while it travels, from memory that may be taken.",
    "cache_transceiver_config.kv_transfer_timeout_ms": "Without it, blocks that nobody fetches are "
    "held forever. The longer of kv_transfer.hold_s and .transfer_s.",
    "enable_iter_perf_stats": "Load reports are made of these.",
    "return_perf_metrics": "Says how long a transfer took, and how many bytes it had.",
    "gather_generation_logits": "Without it this backend refuses requests for log-probabilities, "
    "whatever the engine was built with.",
    "enable_mixed_sampler": "Without it this version samples every request greedily.",
}


def render(
    config: Config,
    role: Role,
    *,
    version: Version,
    flow: Flow,
    spread: Parallelism,
    dtype: str,
    model: str = ".",
) -> str:
    """The YAML for workers of `role`. Raises ConfigError for a key that the version cannot honour.

    `dtype` is `auto` for quantized weights; `model` is relative to the YAML file's folder.
    """
    written = arguments(
        config, role, version=version, flow=flow, spread=spread, dtype=dtype, model=model
    )
    extra = config.tensorrt_llm.llm_args
    for name in _dotted(extra):
        if name in _OWNED:
            raise ConfigError(
                f"tensorrt_llm.llm_args.{name}",
                f"is decided by `{_OWNED[name]}`, on which other parts of the deployment rely",
                remedy=f"remove it, and set `{_OWNED[name]}`",
            )
    merged = _merged(written, extra)
    head = (
        f"# What TensorRT-LLM {version} is started with in {role} workers (flow: {flow}).\n"
        "# Made by build_engine from config.yaml; change that, not this file.\n"
    )
    required = f"\n# From tensorrt_llm.llm_args: these must exist.\n{REQUIRED}: "
    return head + "\n".join(_lines(merged, "")) + "\n" + required + _value(_dotted(extra)) + "\n"


def arguments(
    config: Config,
    role: Role,
    *,
    version: Version,
    flow: Flow,
    spread: Parallelism,
    dtype: str,
    model: str,
) -> Arguments:
    """What we set for `role`, before a person's own arguments."""
    engine, own = config.engine, config.tensorrt_llm
    guided = None if own.guided_decoding == "none" else own.guided_decoding
    if guided == "llguidance" and flow == "trtllm-build":
        raise ConfigError(
            "tensorrt_llm.guided_decoding",
            "the TensorRT backend has no llguidance",
            remedy="set it to `xgrammar` or `none`, or remove `engine.flow`",
        )
    everything: Arguments = {
        "model": model,
        "tensor_parallel_size": spread.tensor,
        "pipeline_parallel_size": spread.pipeline,
        "trust_remote_code": False,
        "skip_tokenizer_init": guided is None,
        "guided_decoding_backend": guided,
        "enable_chunked_prefill": True,
        "kv_cache_config": _kv_cache(config, version, flow),
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,
        "enable_mixed_sampler": True,
    }
    if guided is None:
        del everything["guided_decoding_backend"]
    if flow == "pytorch":  # a built engine has these inside
        everything |= {
            "dtype": dtype,
            "max_batch_size": engine.max_batch_size,
            "max_seq_len": engine.resolved_context,
            "max_input_len": engine.resolved_context,
            "max_num_tokens": max(engine.step_tokens(), engine.max_batch_size),
        }
    else:
        everything["gather_generation_logits"] = True
    if role == "prefill":
        everything |= {"disable_overlap_scheduler": True, "cuda_graph_config": None}
    if role != "agg":
        everything["cache_transceiver_config"] = _transceiver(config, version)
    return _known(everything, version, flow)


def _kv_cache(config: Config, version: Version, flow: Flow) -> Arguments:
    engine, own = config.engine, config.tensorrt_llm
    if (
        flow == "pytorch"
        and not _exists("kv_cache_config.tokens_per_block", version)
        and engine.block_size != DEFAULT_TOKENS_PER_BLOCK
    ):
        raise ConfigError(
            "engine.block_size",
            f"TensorRT-LLM {version} has KV blocks of {DEFAULT_TOKENS_PER_BLOCK} tokens and no "
            "other",
            remedy=f"set it to {DEFAULT_TOKENS_PER_BLOCK}",
        )
    kv: Arguments = {
        "enable_block_reuse": True,
        "event_buffer_max_size": own.event_buffer_max_size,
        "tokens_per_block": engine.block_size,
        "free_gpu_memory_fraction": own.free_gpu_memory_fraction,
    }
    if flow == "trtllm-build":
        del kv["tokens_per_block"]  # it is built into the engine
    if engine.kv_cache_tokens is not None:
        kv["max_tokens"] = engine.kv_cache_tokens
    if engine.host_cache_bytes:
        kv["host_cache_size"] = engine.host_cache_bytes
    if own.kv_cache_dtype != "auto":
        if flow == "trtllm-build":
            raise ConfigError(
                "tensorrt_llm.kv_cache_dtype",
                "the TensorRT backend takes the KV dtype from the checkpoint",
                remedy="set it to `auto`, or remove `engine.flow`",
            )
        kv["dtype"] = own.kv_cache_dtype
    return kv


def _transceiver(config: Config, version: Version) -> Arguments:
    moving = config.kv_transfer
    backend = moving.transport.upper()
    return {
        "backend": backend.lower() if version.line == (1, 0) else backend,
        "transceiver_runtime": "CPP",
        "max_tokens_in_buffer": config.engine.resolved_context,
        "kv_transfer_timeout_ms": int(1000 * max(moving.hold_s, moving.transfer_s)),
    }


def _known(everything: Arguments, version: Version, flow: Flow, path: str = "") -> Arguments:
    """Without what the version or its backend lacks."""
    kept = {}
    for key, value in everything.items():
        name = f"{path}{key}"
        if not _exists(name, version) or (flow == "trtllm-build" and name in _TORCH_ONLY):
            continue
        nested = isinstance(value, dict)
        kept[key] = _known(value, version, flow, f"{name}.") if nested else value
    return kept


def _exists(name: str, version: Version) -> bool:
    return _SINCE.get(name, (0, 0)) <= version.line <= _UNTIL.get(name, (99, 0))


def _merged(base: Arguments, extra: Mapping[str, Any]) -> Arguments:
    """`extra` over `base`, section by section; neither is changed."""
    merged = dict(base)
    for key, value in extra.items():
        below = merged.get(key)
        nested = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merged(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def _dotted(extra: Mapping[str, Any], path: str = "") -> list[str]:
    names: list[str] = []
    for key, value in extra.items():
        if isinstance(value, dict) and value:
            names += _dotted(value, f"{path}{key}.")
        else:
            names.append(f"{path}{key}")
    return names


def _lines(content: Mapping[str, Any], path: str, indent: str = "") -> list[str]:
    lines = []
    for key, value in content.items():
        reason = _REASONS.get(f"{path}{key}")
        if reason is not None:
            lines.append(f"{indent}# {reason}")
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{_name(key)}:")
            lines += _lines(value, f"{path}{key}.", indent + "  ")
        else:
            lines.append(f"{indent}{_name(key)}: {_value(value)}")
    return lines


def _name(key: str) -> str:
    return key if key.isidentifier() else _value(key)


def _value(value: Any) -> str:
    """On one line. What ends a document follows a bare scalar, and is not wanted here."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
