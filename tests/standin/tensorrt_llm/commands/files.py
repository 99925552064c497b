"""Test code. What the tools leave behind, instead of converted weights and compiled engines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

MODEL = "standin-model"
"""The Hugging Face folder that the stand-in computes with, inside its checkpoints and engines."""

_KEPT = (".json", ".safetensors", ".jinja")


def link_model(source: Path, target: Path) -> None:
    """Hard links, copies where there can be none. Raises FileNotFoundError without config.json."""
    if not (source / "config.json").exists():
        raise FileNotFoundError(source / "config.json")
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in _KEPT or path.name == "engine.json":
            continue
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)


def mapping(tp_size: int, pp_size: int) -> dict[str, Any]:
    return {
        "world_size": tp_size * pp_size,
        "tp_size": tp_size,
        "pp_size": pp_size,
        "cp_size": 1,
        "gpus_per_node": 8,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
