"""What a GGUF file says about its model, and whether transformers reads all of it.

transformers keeps a fixed list of keys for each architecture and drops the others without a word.
Dropped scalings and windows do not stop a model; it answers wrongly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from serving.errors import ModelError

_REMEDY = "use the model's original repository or folder with safetensors"
# Keys of this kind change what a model computes.
_MEANINGFUL = re.compile(r"scal|cap|clamp|window|temperature|swin|alibi|norm_before|rope\.")
# What these hold is read, is the default, or only says how the file came to be.
_HARMLESS = {"rope.dimension_count", "rope.scaling.finetuned", "rope.freq_base"}
_OFF = {"", "none", 0, 1.0}


def require_complete(path: Path) -> None:
    """Raises ModelError when the file has a scaling, window or cap that would be dropped."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = str(_value(reader, "general.architecture"))
    known = {key for key, name in _mapped(architecture).items() if name is not None}
    prefix = f"{architecture}."
    for key in reader.fields:
        name = key.removeprefix(prefix)
        if key == name or name in known | _HARMLESS or not _MEANINGFUL.search(name):
            continue
        value = _value(reader, key)
        off = str(value).lower() in _OFF or value in _OFF
        # A context length is of no use without a scaling, which has a key of its own.
        if not off and not name.startswith(("rope.scaling.original", "rope.scaling.yarn")):
            raise ModelError(
                f"{path.name} says `{key}: {value}`, which would be lost when it is converted",
                remedy=_REMEDY,
            )
    for tensor in reader.tensors:
        if "rope" in tensor.name:
            raise ModelError(
                f"{path.name} has a tensor `{tensor.name}` for its rotary positions, which would "
                "be lost when it is converted",
                remedy=_REMEDY,
            )


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _mapped(architecture: str) -> dict[str, str | None]:
    """transformers' keys of an architecture, under GGUF's or its own name of it."""
    from transformers.integrations import ggml

    names = (architecture, re.sub(r"moe$", "_moe", architecture), architecture.replace("-", "_"))
    mapping: Any = ggml.GGUF_CONFIG_MAPPING
    found: dict[str, str | None] = {}
    for name in names:
        found = found or mapping.get(name, {})
    return found
