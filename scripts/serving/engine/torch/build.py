"""Build an engine: a downloaded model, packed in one dtype, checked against its source.

With dummy weights there is nothing to pack or to check: workers make them from the config.

The result is a Hugging Face folder (config.json, safetensors, tokenizer.json, ...) and
`engine.json`. It is built beside its final place and moved there when it is complete, so that a
killed build leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.config import EngineConfig, TextOnly
from serving.engine.files import sha256_of
from serving.engine.integrity import note_verified
from serving.engine.manifest import (
    ENGINE_FORMAT,
    BuildCheck,
    EngineManifest,
    ModelManifest,
    check_max_model_len,
    write_json,
)
from serving.engine.manifest import load_manifest as load_manifest  # workers look for it here
from serving.engine.torch.build_check.serving_check import check_small_model
from serving.engine.torch.kv.config_layout import kv_layout
from serving.engine.torch.weights.context import model_max_len
from serving.engine.torch.weights.dummy import UNCHECKED, describe_dummy
from serving.engine.torch.weights.load import pack_weights
from serving.engine.torch.weights.source import Source
from serving.engine.torch.weights.supported import (
    model_class_of,
    require_equal_layers,
    require_supported,
)
from serving.errors import ModelError
from serving.kv_layout import KvLayout, kv_dtype
from serving.progress import Report

if TYPE_CHECKING:
    pass


def build_engine(
    manifest: ModelManifest,
    out_dir: Path,
    *,
    engine: EngineConfig,
    fingerprint: str,
    report: Report,
    text_only: TextOnly = "auto",
) -> EngineManifest:
    """Build into `out_dir`, replacing what is there. `engine.device` and `.dtype` are not `auto`.

    `text_only` is `model.text_only`.

    Raises ModelError (the model cannot be run exactly, or its files changed) or ConfigError.
    """
    if "auto" in (engine.device, engine.dtype):
        raise ValueError("device and dtype must be resolved before an engine is built")
    _quiet()
    staging = out_dir.with_name(f".{out_dir.name}.building")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        built = _build(manifest, staging, engine, fingerprint, report, text_only)
        write_json(staging / "engine.json", built)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        staging.rename(out_dir)
        note_verified(out_dir, list(built.weights))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report(f"built {out_dir}: {built.architecture} in {built.dtype}")
    return built


def _build(
    manifest: ModelManifest,
    staging: Path,
    engine: EngineConfig,
    fingerprint: str,
    report: Report,
    text_only: TextOnly,
) -> EngineManifest:
    require_unchanged(manifest)
    report(f"reading {manifest.id}")
    source = Source(manifest, text_only)
    config = source.config
    if source.outer:
        source.outer.require_text_model()
        without = ", ".join(source.outer.text_of.left_out)
        report(
            f"serving text only: the language model of {source.outer.architecture}"
            + (f", without {without}" if without else "")
        )
    require_supported(config)
    limit = model_max_len(config)
    if limit is None:
        raise ModelError(
            "config.json does not say how long a prompt may be",
            remedy="add max_position_embeddings to it",
        )
    check_max_model_len(engine.max_model_len, limit, manifest.id)
    layout = kv_layout(config, engine.block_size, kv_dtype(engine.dtype))
    if engine.backend == "torch" and engine.device == "cuda":
        require_equal_layers(layout, config.num_hidden_layers)
    source.save_tokenizer(staging)
    source.save_pooling(staging)
    if engine.backend == "torch":
        check_small_model(config, staging, report, source.reference_model, device=engine.device)
    check, dummy = UNCHECKED, None
    if engine.weights == "dummy":
        source.save_config(staging)
        dummy = describe_dummy(config, staging, layout, report)
    else:
        check = _pack(source, staging, engine.dtype, layout, report)
    eos_token_ids = write_generation_config(source, staging)
    weights = {path.name: sha256_of(path) for path in sorted(staging.glob("*.safetensors"))}
    identity = f"{dummy} {sha256_of(staging / 'config.json')}" if dummy else json.dumps(weights)
    content = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return EngineManifest(
        format=ENGINE_FORMAT,
        fingerprint=fingerprint,
        backend=engine.backend,
        device=engine.device,
        model_id=manifest.id,
        commit=manifest.commit,
        architecture=model_class_of(config).__name__,
        dtype=engine.dtype,
        kv_layout=layout,
        model_max_len=limit,
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        hash_salt=f"{manifest.id}@{manifest.commit or content}:{engine.dtype}",
        weights=weights,
        versions={
            name: metadata.version(name)
            for name in ("torch", "transformers", "tokenizers", "safetensors", "gguf")
        },
        check=check,
        created=int(time.time()),
        dummy_weights=dummy,
        text_of=source.outer.text_of if source.outer else None,
    )


def _pack(
    source: Source, staging: Path, dtype: str, layout: KvLayout, report: Report
) -> BuildCheck:
    """What is quantized is unpacked first, and a multimodal model's language model taken out."""
    folder = staging.with_name(f"{staging.name}-plain")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        source = source.unpacked(folder / "unpacked", kv_dtype(dtype), report)
        source = source.text_checkpoint(folder / "text", report)
        return pack_weights(source, staging, dtype, layout, report)
    finally:
        shutil.rmtree(folder)


def require_unchanged(manifest: ModelManifest) -> None:
    """Raises ModelError when the files are not those that download_model described.

    Files with a checksum are read whole; a person's own large files have none.
    """
    for file in manifest.files:
        path = Path(manifest.path) / file.path
        stat = path.stat() if path.exists() else None
        if (
            stat is None
            or stat.st_size != file.size
            or file.mtime_ns not in (None, stat.st_mtime_ns)
        ):
            raise ModelError(
                f"{path} {'is gone' if stat is None else 'has changed'} since download_model ran",
                remedy="run `snakemake --forcerun download_model` with the same target",
            )
        if file.sha256 is not None and sha256_of(path) != file.sha256:
            raise ModelError(
                f"{path} is damaged: its checksum is not the one that download_model saw",
                remedy="copy or fetch that file again, then run "
                "`snakemake --forcerun download_model` with the same target",
            )


def write_generation_config(source: Source, staging: Path) -> list[int]:
    """Write generation_config.json with every token that ends an answer, and return those.

    Fine-tuned chat models often name their end-of-turn token in the tokenizer alone.
    """
    content = source.generation_config()
    config = source.config
    eos_token_ids: list[int] = []
    for stated in (content.get("eos_token_id", config.eos_token_id), _tokenizer_eos(staging)):
        listed = stated if isinstance(stated, list) else [stated]
        eos_token_ids += [each for each in listed if each is not None and each not in eos_token_ids]
    content["eos_token_id"] = eos_token_ids
    content.setdefault("bos_token_id", config.bos_token_id)
    content.setdefault("pad_token_id", config.pad_token_id)
    (staging / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return eos_token_ids


def _tokenizer_eos(folder: Path) -> int | None:
    from tokenizers import Tokenizer

    path = folder / "tokenizer_config.json"
    token: Any = json.loads(path.read_text()).get("eos_token") if path.exists() else None
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    found: int | None = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    return found


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
