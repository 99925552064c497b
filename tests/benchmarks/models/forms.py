"""Forms that a checkpoint comes in: each turns a folder in Hugging Face's format, float32, into one.

To add a form, write a function and name it in `FORMS`, or in a module of its own that is merged into
`FORMS` at the end.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from benchmarks.models.checkpoint import Form
from benchmarks.models.gguf_checkpoint import as_gguf
from benchmarks.models.quantizers import QUANTIZED_FORMS
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def _as_is(folder: Path) -> None:
    """One safetensors file in float32."""


def _in_bfloat16(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shard_of = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        part = {name: weights[name] for name in weights if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _with_scales(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[f"{name}_scale"] = torch.ones(1)
    save_file(weights, path, metadata={"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tekken.json")


FORMS: dict[str, Form] = {
    "safetensors": _as_is,
    "bfloat16": _in_bfloat16,
    "sharded": _sharded,
    "pickle": _pickled,
    "tensors with scales": _with_scales,
    "tekken.json alone": _without_tokenizer,
    **QUANTIZED_FORMS,
    **{f"GGUF {kind}": as_gguf(kind) for kind in ("F16", "Q8_0", "Q4_K")},
}
