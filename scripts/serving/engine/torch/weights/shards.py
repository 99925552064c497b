"""Weights to safetensors files, as they come: one file, or shards and their index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

NamedTensors = Iterator[tuple[str, torch.Tensor]]

SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"


def write_shards(weights: NamedTensors, target: Path) -> list[str]:
    """Write to the folder `target`; returns the names of the files."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, target / _name(len(shards)), metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        if pending and sum(each.nbytes for each in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
    flush()
    if len(shards) == 1:
        (target / _name(0)).rename(target / "model.safetensors")
        return ["model.safetensors"]
    places = {name: _name(index) for index, names in enumerate(shards) for name in names}
    size = sum((target / _name(index)).stat().st_size for index in range(len(shards)))
    (target / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    return [INDEX, *map(_name, range(len(shards)))]


def _name(index: int) -> str:
    return f"model-{index + 1:05}.safetensors"
