"""The arguments of `LLM` for one role: from the engine's YAML file to what this version takes.

The file is written when the engine is built, perhaps for a version a little older or newer than
the one that reads it. Then our own defaults may be dropped, but never an argument that a person set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from serving.engine.trtllm.versions import Version, fields_of
from serving.errors import ModelError, OperatorError

CONFIG_CLASSES = {
    "kv_cache_config": "KvCacheConfig",
    "cache_transceiver_config": "CacheTransceiverConfig",
    "scheduler_config": "SchedulerConfig",
    "dynamic_batch_config": "DynamicBatchConfig",
    "cuda_graph_config": "CudaGraphConfig",
}
"""Keys whose value is made one of the library's classes; others it takes as plain mappings."""

_PATHS = ("model", "tokenizer")

FindClass = Callable[[str], Any]
"""A class of the library by name, None when this version has none of that name."""


class LlmArguments(Struct, frozen=True):
    """`values` as in the file; `required` are dotted keys that a person set."""

    values: dict[str, Any]
    required: frozenset[str]

    def section(self, key: str) -> dict[str, Any]:
        """The mapping under `key`; empty when there is none."""
        return self.values.get(key) or {}

    def fitted(self, args_class: Any, find_class: FindClass, version: Version) -> dict[str, Any]:
        """Keyword arguments for the `LLM` whose arguments `args_class` models.

        Raises OperatorError for a required key that this version does not know.
        """
        return self._fit(self.values, "", args_class, find_class, version)

    def _fit(
        self,
        values: dict[str, Any],
        prefix: str,
        kind: Any,
        find_class: FindClass,
        version: Version,
    ) -> dict[str, Any]:
        known = fields_of(kind)
        fitted = {}
        for key, value in values.items():
            dotted = prefix + key
            if known is not None and key not in known:
                if self._is_required(dotted):
                    raise OperatorError(
                        f"TensorRT-LLM {version} has no argument `{dotted}`, which "
                        "`tensorrt_llm.llm_args` sets",
                        remedy="remove it there, or name it as this version does",
                    )
                continue
            fitted[key] = value
            nested = find_class(CONFIG_CLASSES[key]) if key in CONFIG_CLASSES else None
            if nested is not None and isinstance(value, dict):
                inner = self._fit(value, f"{dotted}.", nested, find_class, version)
                fitted[key] = nested(**inner)
        return fitted

    def _is_required(self, dotted: str) -> bool:
        """Named itself, or something in it is."""
        return any(name == dotted or name.startswith(f"{dotted}.") for name in self.required)


def read_arguments(engine_dir: Path, filename: str) -> LlmArguments:
    """`model` and `tokenizer` come back absolute. Raises ModelError when the file is damaged."""
    path = engine_dir / filename
    remedy = f"delete {engine_dir} and run the same snakemake target again: it rebuilds the engine"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror}", remedy=remedy) from exc
    except yaml.YAMLError as exc:
        raise ModelError(f"{path} is damaged: {exc}", remedy=remedy) from exc
    if not isinstance(raw, dict) or "model" not in raw:
        raise ModelError(f"{path} names no `model`", remedy=remedy)
    required = frozenset(raw.pop("_required", None) or [])
    for key in _PATHS:
        if isinstance(raw.get(key), str):
            raw[key] = str((engine_dir / raw[key]).resolve())
    return LlmArguments(raw, required)
