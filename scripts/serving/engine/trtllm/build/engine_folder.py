"""Makes an engine for TensorRT-LLM: a checked checkpoint, its arguments per role, and a manifest.

The flow `pytorch` has no engine file: the library loads the checkpoint as it is, so the engine is
a Hugging Face folder and YAML. `trtllm-build` adds TensorRT engines (see `tensorrt_flow`). Either is
made beside its final place and moved there when complete. The library itself runs in processes of
its own, started by `run`, since it may live in a container.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from serving.config import Config
from serving.engine.manifest import (
    ENGINE_FORMAT,
    EngineManifest,
    ModelManifest,
    check_max_model_len,
    write_json,
)
from serving.engine.trtllm.build import llm_args, tensorrt_flow
from serving.engine.trtllm.build.checkpoint import Checkpoint, read_checkpoint, require_loadable
from serving.engine.trtllm.build.installed import RunProgram, probe_library
from serving.engine.trtllm.build.memory import longest_context, require_memory
from serving.engine.trtllm.build.quantization import (
    require_dtype,
    require_kv_dtype,
    require_quantization,
)
from serving.engine.trtllm.build.staging import stage_checkpoint, weight_identities
from serving.engine.trtllm.build.target import Host, parallelism, resolve_flow, stamp
from serving.progress import Report
from serving.protocol import Role


def build_engine(
    manifest: ModelManifest,
    out_dir: Path,
    *,
    config: Config,
    roles: Sequence[Role],
    fingerprint: str,
    run: RunProgram,
    host: Host,
    report: Report,
) -> EngineManifest:
    """Build into `out_dir`, replacing its contents, for workers of `roles`.

    `engine.device` and `engine.dtype` are not `auto`. `run` starts a program where the library is.
    Raises ModelError (the library cannot load this model), ConfigError, or OperatorError (no
    library, no room on the GPUs, a failed tool).
    """
    if "auto" in (config.engine.device, config.engine.dtype):
        raise ValueError("device and dtype must be resolved before an engine is built")
    out_dir = out_dir.absolute()
    staging = out_dir.with_name(f".{out_dir.name}.building")
    shutil.rmtree(staging, ignore_errors=True)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        built = _build(manifest, staging, config, roles, fingerprint, run, host, report)
        write_json(staging / "engine.json", built)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        staging.rename(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    made_for = ", ".join(f"{name} {value}" for name, value in built.stamp.items())
    report(f"built {out_dir}: {built.architecture} in {built.dtype} for {made_for}")
    return built


def _build(
    manifest: ModelManifest,
    staging: Path,
    config: Config,
    roles: Sequence[Role],
    fingerprint: str,
    run: RunProgram,
    host: Host,
    report: Report,
) -> EngineManifest:
    from serving.engine.torch.build import require_unchanged

    engine = config.engine
    require_unchanged(manifest)
    library = probe_library(run)
    report(f"TensorRT-LLM {library.version}, CUDA {library.cuda or 'unknown'}")
    version, spreads = library.version, parallelism(config, roles)
    flow = resolve_flow(config, version)
    check, layout, eos_token_ids = stage_checkpoint(manifest, staging, config, report)
    checkpoint = read_checkpoint(staging)
    require_loadable(checkpoint, version=version, flow=flow, parallelism=spreads)
    require_quantization(checkpoint.quantization, version=version, capabilities=host.capabilities)
    require_kv_dtype(config.tensorrt_llm, host.capabilities)
    require_dtype(engine.dtype, host.capabilities)
    check_max_model_len(engine.max_model_len, checkpoint.model_max_len, manifest.id)
    if engine.max_model_len == "auto":
        longest = longest_context(
            checkpoint, config, spreads, dtype=engine.dtype, memory_bytes=host.memory_bytes
        )
        report(f"engine.max_model_len: {longest} of the model's {checkpoint.model_max_len} tokens")
        engine = msgspec.structs.replace(engine, max_model_len=longest)
        config = msgspec.structs.replace(config, engine=engine)
    for line in require_memory(
        checkpoint, config, spreads, dtype=engine.dtype, memory_bytes=host.memory_bytes
    ):
        report(line)
    if flow == "trtllm-build":
        tensorrt_flow.build_engines(
            staging, checkpoint, config, sorted(set(spreads.values())), run=run, report=report
        )
    rendered: dict[Role, str] = {}
    for role, spread in spreads.items():
        rendered[role] = f"llm_args-{role}.yaml"
        text = llm_args.render(
            config,
            role,
            version=version,
            flow=flow,
            spread=spread,
            dtype="auto" if checkpoint.quantization else engine.dtype,
            model=tensorrt_flow.folder(spread) if flow == "trtllm-build" else ".",
        )
        (staging / rendered[role]).write_text(text, encoding="utf-8")
    weights = weight_identities(manifest, staging)
    content = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
    plain = json.loads((staging / "generation_config.json").read_text())
    return EngineManifest(
        format=ENGINE_FORMAT,
        fingerprint=fingerprint,
        backend=engine.backend,
        device=engine.device,
        model_id=manifest.id,
        commit=manifest.commit,
        architecture=checkpoint.architecture,
        dtype=engine.dtype,
        kv_layout=layout,
        model_max_len=checkpoint.model_max_len,
        vocab_size=checkpoint.vocab_size,
        eos_token_ids=eos_token_ids,
        bos_token_id=plain.get("bos_token_id"),
        pad_token_id=plain.get("pad_token_id"),
        hash_salt=_hash_salt(manifest, checkpoint, config, content),
        weights=weights,
        versions={
            "tensorrt_llm": version.text,
            **{
                name: metadata.version(name)
                for name in ("transformers", "tokenizers", "safetensors")
            },
        },
        check=check,
        created=int(time.time()),
        flow=flow,
        stamp=stamp(version, library.cuda, host),
        llm_args=rendered,
        max_model_len=engine.resolved_context,
    )


def _hash_salt(
    manifest: ModelManifest, checkpoint: Checkpoint, config: Config, content: str
) -> str:
    """Equal where KV is: not across engines, nor across dtypes of weights or KV."""
    how = checkpoint.quantization.algorithm if checkpoint.quantization else config.engine.dtype
    kv = config.tensorrt_llm.kv_cache_dtype
    return f"{manifest.id}@{manifest.commit or content}:{how}:tensorrt_llm:{kv}"
