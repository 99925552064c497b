"""Make an engine for TensorRT-LLM: a checked checkpoint, its arguments per role, and a manifest.

The flow `pytorch` has no engine file: the library loads the checkpoint as it is, so the engine is
a Hugging Face folder and YAML. `trtllm-build` adds TensorRT engines (see `tensorrt_flow`). Either is
made beside its final place and moved there when complete. The library itself runs in processes of
its own, through the `run` that is passed in: it may live in a container.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from serving.config import Config
from serving.engine.files import Progress, sha256_of
from serving.engine.manifest import (
    ENGINE_FORMAT,
    BuildCheck,
    EngineManifest,
    ModelManifest,
    check_max_model_len,
    load_manifest,
    write_json,
)
from serving.engine.trtllm.build import llm_args, tensorrt_flow
from serving.engine.trtllm.build.checkpoint import Checkpoint, read_checkpoint, require_loadable
from serving.engine.trtllm.build.installed import RunProgram, probe_library
from serving.engine.trtllm.build.memory import require_memory
from serving.engine.trtllm.build.quantization import (
    require_dtype,
    require_kv_dtype,
    require_quantization,
)
from serving.engine.trtllm.build.target import Host, parallelism, resolve_flow, stamp
from serving.kv_layout import KvLayout
from serving.protocol import Role

_CHECKED_ONLY = BuildCheck(
    kind="checkpoint", num_positions=0, max_abs_diff=0.0, argmax_agreement=1.0, tolerance=0.0
)


def build_engine(
    manifest: ModelManifest,
    out_dir: Path,
    *,
    config: Config,
    roles: Sequence[Role],
    fingerprint: str,
    run: RunProgram,
    host: Host,
    progress: Progress,
) -> EngineManifest:
    """Build into `out_dir`, replacing what is there, for workers of `roles`.

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
        built = _build(manifest, staging, config, roles, fingerprint, run, host, progress)
        write_json(staging / "engine.json", built)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        staging.rename(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    made_for = ", ".join(f"{name} {value}" for name, value in built.stamp.items())
    progress(f"built {out_dir}: {built.architecture} in {built.dtype} for {made_for}")
    return built


def _build(
    manifest: ModelManifest,
    staging: Path,
    config: Config,
    roles: Sequence[Role],
    fingerprint: str,
    run: RunProgram,
    host: Host,
    progress: Progress,
) -> EngineManifest:
    from serving.engine.torch.build import require_unchanged

    engine = config.engine
    require_unchanged(manifest)
    library = probe_library(run)
    progress(f"TensorRT-LLM {library.version}, CUDA {library.cuda or 'unknown'}")
    version, spreads = library.version, parallelism(config, roles)
    flow = resolve_flow(config, version)
    check, layout, eos_token_ids = _stage_checkpoint(manifest, staging, config, progress)
    checkpoint = read_checkpoint(staging)
    require_loadable(checkpoint, version=version, flow=flow, parallelism=spreads)
    require_quantization(checkpoint.quantization, version=version, capabilities=host.capabilities)
    require_kv_dtype(config.tensorrt_llm, host.capabilities)
    require_dtype(engine.dtype, host.capabilities)
    check_max_model_len(engine.max_model_len, checkpoint.model_max_len, manifest.id)
    for line in require_memory(
        checkpoint, config, spreads, dtype=engine.dtype, memory_bytes=host.memory_bytes
    ):
        progress(line)
    if flow == "trtllm-build":
        tensorrt_flow.build_engines(
            staging, checkpoint, config, sorted(set(spreads.values())), run=run, progress=progress
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
    weights = _identities(manifest, staging)
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
    )


def _stage_checkpoint(
    manifest: ModelManifest, staging: Path, config: Config, progress: Progress
) -> tuple[BuildCheck, KvLayout | None, list[int]]:
    """A Hugging Face folder with safetensors, a tokenizer.json and a generation_config.json.

    Safetensors are linked. Other formats are converted, and compared with their source, as for
    the torch engine. Returns what was checked, the layout if it is known, and the ids that end an
    answer.
    """
    from serving.engine.torch.build import build_engine as pack
    from serving.engine.torch.build import write_generation_config
    from serving.engine.torch.weights.source import Source

    if manifest.format != "safetensors":
        engine = msgspec.structs.replace(config.engine, backend="torch")
        pack(manifest, staging, engine=engine, fingerprint="", progress=progress)
        packed = load_manifest(staging)
        (staging / "engine.json").unlink()
        _add_older_names(staging / "config.json")
        return packed.check, packed.kv_layout, packed.eos_token_ids
    staging.mkdir()
    folder = Path(manifest.path)
    for file in manifest.files:
        if file.path.endswith(".safetensors"):
            _link(folder / file.path, staging / file.path)
        else:  # small, and some are written anew below: a person's own must not change
            shutil.copyfile(folder / file.path, staging / file.path)
    _add_older_names(staging / "config.json")
    source = Source(manifest)
    source.save_tokenizer(staging)
    return _CHECKED_ONLY, None, write_generation_config(source, staging)


def _add_older_names(path: Path) -> None:
    """config.json may be written by transformers 5; TensorRT-LLM up to 1.2 reads it with 4.x.

    That would take rotary positions for the default ones, since they moved to `rope_parameters`,
    and answer with nonsense. Version 5 reads both names.
    """
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in config:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = scaling if scaling.get("rope_type") != "default" else None
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        target.symlink_to(source.resolve())


def _identities(manifest: ModelManifest, staging: Path) -> dict[str, str]:
    """Known checksums are used: a large model would take minutes to read."""
    known = {file.path: file for file in manifest.files}
    identities = {}
    for path in sorted(staging.glob("*.safetensors")):
        file = known.get(path.name)
        if file is not None and file.sha256 is None and file.mtime_ns is not None:
            identities[path.name] = f"{file.size} bytes of {file.mtime_ns}"
        else:
            identities[path.name] = (file.sha256 if file else None) or sha256_of(path)
    return identities


def _hash_salt(
    manifest: ModelManifest, checkpoint: Checkpoint, config: Config, content: str
) -> str:
    """Equal where KV is: not across engines, nor across dtypes of weights or KV."""
    how = checkpoint.quantization.algorithm if checkpoint.quantization else config.engine.dtype
    kv = config.tensorrt_llm.kv_cache_dtype
    return f"{manifest.id}@{manifest.commit or content}:{how}:tensorrt_llm:{kv}"
