"""Everything a built engine depends on, as one short hash.

Called while the Snakefile is parsed, so it imports neither torch nor transformers and touches no
network: versions come from package metadata, the GPU and its driver from /proc. Limits (batch size,
pool size, context length) do not change a torch engine, and are not part of its hash. They change
a TensorRT-LLM engine, and its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from serving.config import Config, ContainerConfig, ModelConfig, Weights
from serving.config.resolve import Device, topology_roles
from serving.deploy.model.files import (
    BUNDLED_ID,
    WeightFiles,
    local_files,
    tokenizer_source,
)
from serving.deploy.planning.device import resolve_device, resolve_dtype
from serving.deploy.planning.machine import PACKAGES, Machine, this_machine
from serving.engine.manifest import ENGINE_FORMAT, ModelSource
from serving.engine.trtllm.build.target import parallelism
from serving.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


PACKAGE = Path(__file__).parents[2]


def engine_fingerprint(
    config: Config, machine: Machine | None = None, package: Path = PACKAGE
) -> str:
    """16 hex digits; equal configurations on equal machines give equal engines.

    `package` holds the kernels that are compiled into int8 engines.
    Raises ConfigError when `model.id` or `model.source` contradict each other, or name a missing path.
    """
    machine = machine or this_machine()
    device = resolve_device(config, machine)
    parts = {
        "format": ENGINE_FORMAT,
        "model": _model_identity(config.model, config.engine.weights),
        "backend": config.engine.backend,
        "device": device,
        "dtype": resolve_dtype(config, machine),
        "block_size": config.engine.block_size,
        "versions": {name: machine.versions[name] for name in PACKAGES},
        "gpus": machine.gpu_names if device == "cuda" else [],
    }
    if parts["dtype"] == "int8":
        # Compiled into the engine, so new ones are a new engine.
        sources = sorted((package / "engine" / "torch").rglob("*.c"))
        parts["kernels"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    if config.engine.backend == "tensorrt_llm":
        parts["tensorrt_llm"] = _tensorrt_llm_parts(config, device, machine)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tensorrt_llm_parts(config: Config, device: Device, machine: Machine) -> dict[str, Any]:
    """What only a TensorRT-LLM engine depends on."""
    engine = config.engine
    parallel = parallelism(config, topology_roles(config.deployment.topology))
    return {
        "flow": engine.flow,
        "limits": [
            engine.max_model_len,
            engine.max_batch_size,
            engine.step_tokens(),
            engine.kv_cache_tokens,
            engine.host_cache_bytes,
        ],
        "parallel": {role: str(spread) for role, spread in parallel.items()},
        "settings": to_builtins(config.tensorrt_llm),
        "transfer": [
            config.kv_transfer.transport,
            config.kv_transfer.hold_s,
            config.kv_transfer.transfer_s,
        ],
        "library": library_identity(config.container, machine),
        "driver": machine.driver if device == "cuda" else "",
    }


def library_identity(container: ContainerConfig, machine: Machine) -> list[Any]:
    """The TensorRT-LLM that workers load: a version on the host, or the image that has it.

    The name of an image is enough, because a pulled image keeps its digest. A file is identified
    by size and time.
    """
    if container.runtime == "none":
        return [machine.versions["tensorrt_llm"]]
    if container.image is None:
        built_from = (container.base_image, container.base_tag, container.source_commit)
        return [container.runtime, *built_from]
    identity: list[Any] = [container.runtime, container.image]
    path = Path(container.image).expanduser()
    if path.is_file():
        stat = path.stat()
        identity += [stat.st_size, stat.st_mtime_ns]
    return identity


def model_key(config: ModelConfig, weights: Weights = "real") -> str:
    """A folder name for the model: readable, and different when the download would be."""
    identity = json.dumps([_model_identity(config, weights), config.allow_pickle], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "--", config.id.strip("/~.")).strip("-") or "model"
    return f"{name[-80:]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def resolve_source(config: ModelConfig) -> ModelSource:
    """Where the model comes from. Raises ConfigError for a contradiction."""
    source = config.source
    if source == "auto":
        if config.id.startswith(("/", "./", "../", "~")):
            source = "local"
        elif config.id == BUNDLED_ID and config.revision is None:
            source = "bundled"
        else:
            source = "hub"
    if source == "bundled" and config.id != BUNDLED_ID:
        raise ConfigError(
            "model.source", f"only {BUNDLED_ID} is bundled", remedy="use `hub`, or that model"
        )
    if source != "hub" and config.revision is not None:
        raise ConfigError(
            "model.revision",
            f"a {source} model has no revisions",
            remedy="remove it, or set `model.source: hub`",
        )
    if source == "hub" and not _HUB_ID.fullmatch(config.id):
        raise ConfigError(
            "model.id",
            f"{config.id!r} is no hub ID",
            remedy="write `org/name`, or start a path with `/`, `./` or `~`",
        )
    return source


def _model_identity(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    source = resolve_source(config)
    identity: dict[str, Any] = {"source": source, "id": config.id, "revision": config.revision}
    if source == "local":
        # A changed local model must give another engine; stat is cheap enough at parse time.
        found: WeightFiles = local_files(config, weights=weights)
        identity["id"] = str(found.folder)
        identity["files"] = [_file_identity(found.folder / name) for name in found.names]
    if config.text_only is False:  # a multimodal model is then refused, not built
        identity["text_only"] = False
    if weights == "dummy":
        identity |= {"weights": weights, "tokenizer": config.tokenizer}
        if lent := tokenizer_source(config):
            files = sorted(lent.glob("*token*")) if lent.is_dir() else [lent]
            identity["tokenizer"] = [str(lent), *map(_file_identity, files)]
    return identity


def _file_identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns
