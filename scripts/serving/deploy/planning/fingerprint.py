"""What a built engine depends on, as one short hash, and the device and dtype that `auto` means.

Called while the Snakefile is parsed, so it imports neither torch nor transformers and touches no
network: versions come from package metadata, the GPU and its driver from /proc. Limits (batch size,
pool size, context length) leave the torch engine as it is, and are not part of its hash; they are
part of a TensorRT-LLM engine, and so of its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from msgspec import to_builtins

from serving.config import Config, ContainerConfig, ModelConfig, Weights
from serving.deploy.model.files import (
    BUNDLED_ID,
    WeightFiles,
    local_files,
    tokenizer_source,
)
from serving.deploy.planning.topology import roles
from serving.engine.manifest import ENGINE_FORMAT, ModelSource
from serving.engine.trtllm.build.target import parallelism
from serving.errors import ConfigError
from serving.gpus import kernel_module_version

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


PACKAGE = Path(__file__).parents[2]


def engine_fingerprint(config: Config) -> str:
    """16 hex digits; equal configurations on equal machines give equal engines.

    Raises ConfigError when `model.id` or `model.source` cannot be meant, or names a missing path.
    """
    device = resolve_device(config)
    parts = {
        "format": ENGINE_FORMAT,
        "model": _model_identity(config.model, config.engine.weights),
        "backend": config.engine.backend,
        "device": device,
        "dtype": resolve_dtype(config),
        "block_size": config.engine.block_size,
        "versions": package_versions(),
        "gpus": gpu_names() if device == "cuda" else [],
    }
    if parts["dtype"] == "int8":
        # Compiled into the engine, so new ones are a new engine.
        sources = sorted((PACKAGE / "engine" / "torch").rglob("*.c"))
        parts["kernels"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    if config.engine.backend == "tensorrt_llm":
        parts["tensorrt_llm"] = _tensorrt_llm_parts(config, device)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tensorrt_llm_parts(config: Config, device: Device) -> dict[str, Any]:
    """What only a TensorRT-LLM engine depends on."""
    engine = config.engine
    spreads = parallelism(config, roles(config.deployment.topology))
    return {
        "flow": engine.flow,
        "limits": [
            engine.max_model_len,
            engine.max_batch_size,
            engine.step_tokens(),
            engine.kv_cache_tokens,
            engine.host_cache_bytes,
        ],
        "parallel": {role: str(spread) for role, spread in spreads.items()},
        "settings": to_builtins(config.tensorrt_llm),
        "transfer": [
            config.kv_transfer.transport,
            config.kv_transfer.hold_s,
            config.kv_transfer.transfer_s,
        ],
        "library": library_identity(config.container),
        "driver": kernel_module_version() if device == "cuda" else "",
    }


def library_identity(container: ContainerConfig) -> list[Any]:
    """The TensorRT-LLM that workers load: a version on the host, or the image that has it.

    An image that is pulled keeps the digest it was first pulled with, so its name says enough; a
    file is known by size and time.
    """
    if container.runtime == "none":
        return [_version_of("tensorrt_llm")]
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
    """Where the model comes from. Raises ConfigError for a combination that cannot be meant."""
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


def resolve_device(config: Config) -> Device:
    """`auto` is CUDA when the driver shows a GPU and torch was not installed for CPU only.

    TensorRT-LLM runs on nothing but CUDA; `cpu` hands out no GPUs, and leaves the rest to whatever
    stands in for the library. The mock engine never needs one.
    """
    if config.engine.device != "auto":
        return config.engine.device
    if config.engine.backend == "tensorrt_llm":
        return "cuda"
    if config.engine.backend == "mock":
        return "cpu"
    return "cuda" if has_gpu() and "+cpu" not in package_versions()["torch"] else "cpu"


def resolve_dtype(config: Config) -> Dtype:
    """`auto` is float32 on CPU (exactly the source's weights) and bfloat16 on CUDA.

    Raises ConfigError for int8 where `engine.device: auto` means CUDA.
    """
    if config.engine.dtype == "int8" and resolve_device(config) == "cuda":
        raise ConfigError(
            "engine.dtype",
            "int8 is for CPUs, and this machine has a GPU that would be used",
            remedy="set it to auto, or `engine.device: cpu`",
        )
    if config.engine.dtype != "auto":
        return config.engine.dtype
    return "bfloat16" if resolve_device(config) == "cuda" else "float32"


def has_gpu(root: Path = Path("/")) -> bool:
    gpus = root / "proc/driver/nvidia/gpus"
    return (gpus.is_dir() and any(gpus.iterdir())) or (root / "dev/nvidia0").exists()


def gpu_names(root: Path = Path("/")) -> list[str]:
    """Distinct product names of the GPUs, sorted; empty where the driver does not tell."""
    names = set()
    for information in (root / "proc/driver/nvidia/gpus").glob("*/information"):
        if match := re.search(r"^Model:\s*(.+?)\s*$", information.read_text(), re.MULTILINE):
            names.add(match.group(1))
    return sorted(names)


def package_versions() -> dict[str, str]:
    """Installed versions of what shapes the artefact; `missing` for what is not there."""
    return {package: _version_of(package) for package in PACKAGES}


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _model_identity(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    source = resolve_source(config)
    identity: dict[str, Any] = {"source": source, "id": config.id, "revision": config.revision}
    if source == "local":
        # A changed local model must give another engine; stat is cheap enough at parse time.
        found: WeightFiles = local_files(config, weights=weights)
        identity["id"] = str(found.folder)
        identity["files"] = [_file_identity(found.folder / name) for name in found.names]
    if weights == "dummy":
        identity |= {"weights": weights, "tokenizer": config.tokenizer}
        if lent := tokenizer_source(config):
            files = sorted(lent.glob("*token*")) if lent.is_dir() else [lent]
            identity["tokenizer"] = [str(lent), *map(_file_identity, files)]
    return identity


def _file_identity(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns
