"""The checkpoint in an engine folder: a Hugging Face folder that any supported version can load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec

from serving.config import Config
from serving.engine.files import sha256_of
from serving.engine.manifest import BuildCheck, ModelManifest, load_manifest
from serving.kv_layout import KvLayout
from serving.progress import Report

_CHECKED_ONLY = BuildCheck(
    kind="checkpoint", num_positions=0, max_abs_diff=0.0, argmax_agreement=1.0, tolerance=0.0
)


def stage_checkpoint(
    manifest: ModelManifest, staging: Path, config: Config, report: Report
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
        pack(manifest, staging, engine=engine, fingerprint="", report=report)
        packed = load_manifest(staging)
        (staging / "engine.json").unlink()
        add_older_names(staging / "config.json")
        return packed.check, packed.kv_layout, packed.eos_token_ids
    staging.mkdir()
    folder = Path(manifest.path)
    for file in manifest.files:
        if file.path.endswith(".safetensors"):
            _link(folder / file.path, staging / file.path)
        else:  # small, and some are written anew below: a person's own must not change
            (staging / file.path).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file.path, staging / file.path)
    add_older_names(staging / "config.json")
    source = Source(manifest)
    source.save_tokenizer(staging)
    return _CHECKED_ONLY, None, write_generation_config(source, staging)


def add_older_names(path: Path) -> None:
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


def weight_identities(manifest: ModelManifest, staging: Path) -> dict[str, str]:
    """A checksum for each weight file. Known ones are reused: a large model takes minutes to read."""
    known = {file.path: file for file in manifest.files}
    identities = {}
    for path in sorted(staging.glob("*.safetensors")):
        file = known.get(path.name)
        if file is not None and file.sha256 is None and file.mtime_ns is not None:
            identities[path.name] = f"{file.size} bytes of {file.mtime_ns}"
        else:
            identities[path.name] = (file.sha256 if file else None) or sha256_of(path)
    return identities
