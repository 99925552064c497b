"""Test code. What one version of TensorRT-LLM has, by class: read from contract.json.

`versions.json` says which sections of the contract stand for which version, and why.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_VERSION = "1.3.0rc27"
REQUIRED = "__required__"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Field:
    """One argument, field or attribute. `default` is REQUIRED, or what the contract writes."""

    type: str
    default: Any
    source: str


Members = dict[str, Field]


def _file(name: str) -> Path:
    """Beside the package in the repository, inside it where `install` put a copy."""
    inside = HERE / name
    return inside if inside.exists() else HERE.parent / name


@functools.cache
def _json(name: str) -> Any:
    return json.loads(_file(name).read_text())


def versions() -> list[str]:
    return list(_json("versions.json"))


def current_version() -> str:
    """An installed copy is the version it was installed as; else the environment chooses."""
    pinned = HERE / "installed-version"
    if pinned.exists():
        return pinned.read_text().strip()
    return os.environ.get("STANDIN_TRTLLM_VERSION", DEFAULT_VERSION)


@functools.cache
def classes(version: str) -> dict[str, Members]:
    """Every class, function and structure of `version` with its members."""
    if version not in versions():
        raise RuntimeError(f"the stand-in knows {', '.join(versions())}, not {version}")
    chain = [version]
    while parent := _json("versions.json")[chain[0]].get("inherits"):
        chain.insert(0, parent)
    found: dict[str, Members] = {}
    for each in chain:
        for name, change in _json("versions.json")[each]["classes"].items():
            if change is None:
                found.pop(name, None)
            else:
                found[name] = _changed(found.get(name, {}), change)
    return found


def members(name: str) -> Members:
    """Of the version in use. Raises KeyError for a class that it does not have."""
    return classes(current_version())[name]


def _changed(before: Members, change: dict[str, Any]) -> Members:
    result = dict(before)
    if "from" in change:
        result = {}
        for path in change["from"]:
            result.update(_section(path))
    for path in change.get("extra", []):
        result.update(_section(path))
    for name, entry in change.get("with", {}).items():
        result[name] = Field(entry["type"], entry["default"], entry["source"])
    for name in change.get("without", []):
        result.pop(name, None)
    return result


def _section(path: list[str]) -> Members:
    content = _json("contract.json")
    for key in path:
        content = content[key]
    where = ".".join(path)
    if isinstance(content, list):  # names alone
        return {n: Field("Any", None, where) for n in content if not n.startswith("*")}
    found = {}
    for name, entry in content.items():
        if isinstance(entry, dict) and "default" in entry:
            found[name] = Field(entry["type"], entry["default"], where)
        elif name == "_properties":
            found.update({n: Field("property", None, where) for n in entry})
        elif not name.startswith("_") and name not in ("kw_only", "returns"):
            kind = entry if isinstance(entry, str) else "method"
            found[name.split("@")[0]] = Field(kind, None, where)
    return found


def structure(name: str) -> dict[str, list[str]]:
    """A JSON structure of the contract (`stats`, `kv_event`): lists of keys by object."""
    content: dict[str, list[str]] = _json("contract.json")[name]
    return content
