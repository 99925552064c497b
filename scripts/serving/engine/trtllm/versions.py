"""Which TensorRT-LLM this is, whether it is supported, and what its classes know.

Between 1.0 and 1.3 arguments were renamed, added and removed, and pre-releases of one version differ
among themselves. So a version number only decides whether to start at all; whether an argument
exists is asked of the class that takes it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from msgspec import Struct

from serving.errors import OperatorError

SUPPORTED = ((1, 0), (1, 1), (1, 2), (1, 3))
"""Release lines, as (major, minor); their pre-releases and patches included."""

LAST_WITH_TENSORRT = (1, 2)
"""The TensorRT flow (`trtllm-build`, `_tensorrt_engine.LLM`) was removed after this one."""

_VERSION = re.compile(r"(\d+)\.(\d+)(?:[.\-+]?[0-9A-Za-z].*)?$")


class Version(Struct, frozen=True):
    """`text` is the library's own (`1.3.0rc27`), `line` its (major, minor)."""

    text: str
    line: tuple[int, int]

    def __str__(self) -> str:
        return self.text


def parse_version(text: str) -> Version:
    """Raises OperatorError when `text` is no version or names one that is not supported."""
    match = _VERSION.match(text.strip())
    line = (int(match[1]), int(match[2])) if match else None
    if line not in SUPPORTED:
        lines = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise OperatorError(
            f"TensorRT-LLM {text} is installed, and this project knows only {lines}: other "
            "versions take other arguments and speak another format of events",
            remedy="install a supported version, or set `container.base_tag` to an image of one",
        )
    assert line is not None, "None is not supported"
    return Version(text.strip(), line)


def fields_of(kind: Any) -> frozenset[str] | None:
    """What the constructor of `kind` takes: its pydantic `model_fields` or dataclass fields.

    None when the class is neither: its fields are unknown.
    """
    model_fields = getattr(kind, "model_fields", None)
    if model_fields is not None:
        return frozenset(model_fields)
    if dataclasses.is_dataclass(kind):
        return frozenset(field.name for field in dataclasses.fields(kind) if field.init)
    return None
