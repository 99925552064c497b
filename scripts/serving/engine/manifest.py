"""What download and build record on disk: `model.json` beside a model, `engine.json` in an engine.

Reading them needs neither torch nor transformers, so workers and scripts can look before they load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from serving.errors import ConfigError, ModelError
from serving.kv_layout import KvLayout
from serving.protocol import Role, TextOf

ENGINE_FORMAT = 4
"""Raised whenever a built engine would come out differently: older ones are then rebuilt."""

ModelSource = Literal["hub", "local", "bundled"]
ModelFormat = Literal["safetensors", "gguf", "pickle", "config"]
"""`config` is a model without weights: a shape, to be filled with dummy ones."""
Flow = Literal["pytorch", "trtllm-build"]


class ModelFile(Struct, frozen=True, omit_defaults=True):
    """One file of a model; `path` is relative to the model's folder, `size` in bytes.

    A person's own large files are not hashed: their identity is `size` and `mtime_ns`, and
    `sha256` is None.
    """

    path: str
    size: int
    sha256: str | None = None
    mtime_ns: int | None = None


class ModelManifest(Struct, frozen=True, kw_only=True):
    """`model.json`. `revision` is what was asked for, `commit` what the hub made of it.

    `path` is the folder that holds `files`: a person's own for a local model, which is never
    copied; else `files` beside model.json (absolute once read). `tokenizer` is a folder with
    tokenizer.json or a `.gguf` file (absolute once read), where it is not the model's own.
    `created` is Unix time.
    """

    id: str
    source: ModelSource
    revision: str | None
    commit: str | None
    format: ModelFormat
    files: list[ModelFile]
    path: str
    created: int
    tokenizer: str | None = None


class DummyWeights(Struct, frozen=True):
    """Random weights that workers make themselves. Equal seeds give equal ones on equal devices."""

    seed: int
    num_weights: int


class BuildCheck(Struct, frozen=True, kw_only=True):
    """How the engine's weights were compared with the source model.

    `logits`: both were run in float32 over `num_positions` prompt positions; differences are over
    all logits, `tolerance` is what `max_abs_diff` had to stay under. `same_files`: the weights are
    the source's own files, byte for byte, so that only their sanity was tested. `checkpoint`: they
    are those files too, and were held against what the engine's library can load; nothing was run.
    `none`: there is no source, since the weights are dummies.
    """

    kind: Literal["logits", "same_files", "checkpoint", "none"]
    num_positions: int
    max_abs_diff: float
    argmax_agreement: float
    tolerance: float


class EngineManifest(Struct, frozen=True, kw_only=True):
    """`engine.json`: what was built, from what, and what a worker must agree with.

    `model_max_len` is the model's own limit in tokens. `hash_salt` is equal on all workers that
    serve equal weights. `weights` maps file names to sha256, or to size and time of a person's own
    large files; it is empty where there are `dummy_weights`. `created` is Unix time.

    Only TensorRT-LLM: `flow` is how the engine came to be; `llm_args` maps each role to the YAML
    file, beside engine.json, with the arguments of its `LLM`; `stamp` says what the engine was
    made for, with those of the keys `tensorrt_llm`, `gpus`, `compute_capability`, `driver` and
    `cuda` that were known. `kv_layout` is None where the library keeps its layout to itself.
    `max_model_len` is the context that the engine was built for.

    `architecture` is the class that is served; `text_of` says where it was taken from.
    """

    format: int
    fingerprint: str
    backend: str
    device: str
    model_id: str
    commit: str | None
    architecture: str
    dtype: str
    kv_layout: KvLayout | None
    model_max_len: int
    vocab_size: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    pad_token_id: int | None
    hash_salt: str
    weights: dict[str, str]
    versions: dict[str, str]
    check: BuildCheck
    created: int
    flow: Flow | None = None
    stamp: dict[str, str] = {}
    llm_args: dict[Role, str] = {}
    max_model_len: int | None = None
    dummy_weights: DummyWeights | None = None
    text_of: TextOf | None = None


def load_manifest(engine_dir: Path) -> EngineManifest:
    """Read `engine.json`. Raises ModelError when there is no finished engine of this format."""
    manifest = _read(Path(engine_dir) / "engine.json", EngineManifest, "build_engine")
    if manifest.format != ENGINE_FORMAT:
        raise ModelError(
            f"{engine_dir} was built in format {manifest.format}, this version reads "
            f"{ENGINE_FORMAT}",
            remedy="run the same snakemake target again: it rebuilds the engine",
        )
    return manifest


def check_max_model_len(
    max_model_len: int | Literal["auto"], model_max_len: int, model_id: str
) -> None:
    """Raises ConfigError when the configured context is longer than the model's own."""
    if max_model_len != "auto" and max_model_len > model_max_len:
        raise ConfigError(
            "engine.max_model_len",
            f"{max_model_len} tokens are more than {model_id} can attend to",
            remedy=f"set it to {model_max_len} or less, or to auto",
        )


def load_model(path: Path) -> ModelManifest:
    """Read `model.json`. Raises ModelError when it is missing or not one of ours."""
    manifest = _read(Path(path), ModelManifest, "download_model")
    here = Path(path).parent
    tokenizer = manifest.tokenizer and str((here / manifest.tokenizer).resolve())
    folder = str((here / manifest.path).resolve())
    return msgspec.structs.replace(manifest, path=folder, tokenizer=tokenizer)


def write_json(path: Path, content: Struct) -> None:
    """Write indented JSON in one atomic step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    temporary.replace(path)


Manifest = TypeVar("Manifest", ModelManifest, EngineManifest)


def _read(path: Path, kind: type[Manifest], rule: str) -> Manifest:
    remedy = f"delete {path} and run the same snakemake target again: `{rule}` recreates it"
    try:
        manifest: Any = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror}", remedy=remedy) from exc
    except msgspec.DecodeError as exc:
        raise ModelError(f"{path} is damaged: {exc}", remedy=remedy) from exc
    return manifest  # type: ignore[no-any-return]
