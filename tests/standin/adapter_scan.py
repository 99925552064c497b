"""Test code. What the adapter's source uses of TensorRT-LLM, found by reading it.

Names of variables say what they hold (`_HOLDERS`), names of functions where keywords go (`_CALLS`).
Whoever renames one of those is told: a class of which no use is found is an error, and so is a use
seen at run time that the source does not show. An attribute that neither this project, nor Python,
nor the contract knows is an error in any case.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import builtins
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass
from datetime import timedelta
from enum import Enum
from importlib import metadata
from logging import Logger
from pathlib import Path
from typing import Any

_HOLDERS = {
    "completion": "CompletionOutput",
    "step": "RequestOutput",
    "result": "RequestOutput",
    "_result": "RequestOutput",
    "answers": "IterationResult",
    "metrics": "RequestPerfMetrics",
    "timing": "TimingMetrics",
    "llm": "LLM",
    "_llm": "LLM",
    "top": "tensorrt_llm",
    "llmapi": "tensorrt_llm.llmapi",
}
_ELEMENTS = {"outputs": "CompletionOutput"}
_CALLS = {
    "_follow": ("LLM.generate_async",),
    "generate_async": ("LLM.generate_async",),
    "ask": ("LLM.get_kv_cache_events_async", "LLM.get_stats_async"),
    "SamplingParams": ("SamplingParams",),
    "sampling_params": ("SamplingParams",),
    "DisaggregatedParams": ("DisaggregatedParams",),
    "disaggregated_params": ("DisaggregatedParams",),
    "logprob": ("Logprob",),
    "guided_decoding_params": ("GuidedDecodingParams",),
}
_KEYS = {
    "sampling.py": "SamplingParams",
    "guided.py": "GuidedDecodingParams",
    "stats.py": "stats",
    "kv_events.py": "kv_event",
}
"""Modules whose dictionary keys are the members of one structure."""
_MERGED = {"prefilled_kv.py": "DisaggregatedParams"}
"""Modules in which what is merged into a dictionary (`| {...}`) are members."""
_VERSIONED = ("tensorrt_llm._tensorrt_engine",)
"""Modules that the source imports only after it has compared versions."""

_PYTHON: tuple[Any, ...] = (
    *(str, bytes, bytearray, int, float, list, dict, set, frozenset, tuple, BaseException),
    *(OSError, ImportError, Path, re.Pattern, re.Match, Field, Enum, timedelta, Logger, ast.AST),
    *(asyncio.Task, asyncio.Future, asyncio.Event, asyncio.AbstractEventLoop),
    *(asyncio.TimerHandle, subprocess.CompletedProcess, subprocess.Popen, threading.Thread),
    *(metadata.PackageNotFoundError, type, type(lambda: None), memoryview, os.stat_result),
    *(type(hashlib.sha256()), argparse.Namespace),
)
_PROCESS = {"returncode", "stdout", "stderr"}


@dataclass(frozen=True, order=True)
class Use:
    """`owner` is a class, function, structure or module of the contract. `is_probe`: the source
    copes with a version that lacks it."""

    owner: str
    member: str
    is_probe: bool
    where: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.member}"


def sources(engine_dir: Path) -> list[Path]:
    """The adapter's modules under `scripts/serving/engine`."""
    return sorted((engine_dir / "trtllm").rglob("*.py"))


def uses(engine_dir: Path) -> list[Use]:
    """Everything found, once per owner, member and kind."""
    found: dict[tuple[str, str, bool], Use] = {}
    for path in sources(engine_dir):
        tree = ast.parse(path.read_text())
        for owner, member, is_probe, line in _in_module(tree, path.name):
            use = Use(owner, member, is_probe, f"{path.name}:{line}")
            found.setdefault((owner, member, is_probe), use)
    return sorted(found.values())


def carried_whole(engine_dir: Path) -> list[str]:
    """Classes whose instances are taken apart and put together by whatever fields they have."""
    carried = []
    for name, owner in _MERGED.items():
        [path] = (engine_dir / "trtllm").rglob(name)
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="fields", value=ast.Name(id="dataclasses"))):
                    carried.append(owner)
    return sorted(set(carried))


def unknown_attributes(
    engine_dir: Path, project_dir: Path, contract: Iterable[str]
) -> list[tuple[str, str]]:
    """(attribute, place) for what neither the project, nor Python, nor `contract` has."""
    known = set(contract) | set(dir(builtins)) | _PROCESS
    for kind in _PYTHON:
        known.update(dir(kind))
    trees = {path: ast.parse(path.read_text()) for path in project_dir.rglob("*.py")}
    # A copy of the adapter under test defines its own names too.
    trees |= {path: ast.parse(path.read_text()) for path in sources(engine_dir)}
    for tree in trees.values():
        known.update(_defined(tree))
    unknown = []
    for path in sources(engine_dir):
        modules = _imported(trees[path])
        for node in ast.walk(trees[path]):
            if not isinstance(node, ast.Attribute) or node.attr in known:
                continue
            if _root(node) not in modules:
                unknown.append((node.attr, f"{path.name}:{node.lineno}"))
    return unknown


def _in_module(tree: ast.Module, filename: str) -> Iterator[tuple[str, str, bool, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=base, attr=attr, ctx=ast.Load()):
                owner = _held_by(base)
                if owner is not None:
                    yield owner, attr, owner in _VERSIONED, node.lineno
            case ast.Call():
                yield from _in_call(node)
            case ast.AnnAssign(target=ast.Name(id="CONFIG_CLASSES"), value=ast.Dict() as table) | (
                ast.Assign(targets=[ast.Name(id="CONFIG_CLASSES")], value=ast.Dict() as table)
            ):
                for each in table.values:
                    if isinstance(each, ast.Constant):
                        yield "tensorrt_llm.llmapi", str(each.value), True, each.lineno
            case ast.BinOp(op=ast.BitOr(), right=ast.Dict(keys=keys)) if filename in _MERGED:
                for key in keys:
                    if isinstance(key, ast.Constant):
                        yield _MERGED[filename], str(key.value), False, key.lineno
        if filename in _KEYS:
            for key, is_probe in _keys(node):
                yield _KEYS[filename], key, is_probe, getattr(node, "lineno", 0)


def _in_call(node: ast.Call) -> Iterator[tuple[str, str, bool, int]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Name):
        name = node.func.id
    for owner in _CALLS.get(name, ()):
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield owner, keyword.arg, False, node.lineno
    if name in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
        owner = _held_by(node.args[0])
        if owner is not None:
            is_probe = name == "hasattr" or len(node.args) > 2
            yield owner, str(node.args[1].value), is_probe, node.lineno
    if name == "_poll":
        for argument in node.args:
            if isinstance(argument, ast.Constant) and str(argument.value).startswith("get_"):
                yield "LLM", str(argument.value), False, node.lineno
    if name == "find_class" and isinstance(node.args[0], ast.Constant):
        yield "tensorrt_llm.llmapi.llm_args", str(node.args[0].value), True, node.lineno
    if name == "import_module" and isinstance(node.args[0], ast.Constant):
        module = str(node.args[0].value)
        yield "modules", module, module in _VERSIONED, node.lineno


def _held_by(base: ast.expr) -> str | None:
    """The contract's name of what an expression holds, by the last name in it."""
    match base:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _HOLDERS.get(name)
        case ast.Subscript(value=ast.Attribute(attr=name)):
            return _ELEMENTS.get(name)
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=module)]):
            return str(module)
    return None


def _keys(node: ast.AST) -> Iterator[tuple[str, bool]]:
    match node:
        case ast.Dict(keys=keys):
            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, False
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            yield key, False
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(key)), *_]):
            yield key, True
        case ast.MatchValue(value=ast.Constant(value=str(key))):
            yield key, False
        case ast.Compare(comparators=[ast.Constant(value=str(key))], left=ast.Subscript()):
            yield key, False


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives to anything: attributes, functions, fields, slots, globals."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case (
                ast.AnnAssign(target=ast.Name(id=name))
                | ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store())
            ):
                yield name
            case ast.Assign(targets=targets, value=value):
                yield from (t.id for t in targets if isinstance(t, ast.Name))
                if any(isinstance(t, ast.Name) and t.id == "__slots__" for t in targets):
                    yield from (
                        each.value
                        for each in ast.walk(value)
                        if isinstance(each, ast.Constant) and isinstance(each.value, str)
                    )
            case ast.Import() | ast.ImportFrom():
                yield from ((a.asname or a.name).split(".")[0] for a in node.names)


def _imported(tree: ast.Module) -> set[str]:
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def _root(node: ast.Attribute) -> str:
    base: ast.expr = node
    while isinstance(base, ast.Attribute):
        base = base.value
    return base.id if isinstance(base, ast.Name) else ""


def names_of(classes: Mapping[str, Mapping[str, object]]) -> set[str]:
    """Every member of a version, whatever it belongs to."""
    return {name for members in classes.values() for name in members}
