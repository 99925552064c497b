"""A row of the model matrix, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING


@dataclass(frozen=True)
class Row:
    """A config of a family, full size, and what becomes of the checkpoint before it is fetched."""

    name: str
    model_type: str
    expected: str = "exact"
    values: dict[str, Any] = field(default_factory=dict)
    form: str = "safetensors"

    @property
    def config(self) -> Any:
        return CONFIG_MAPPING[self.model_type](**self.values)


@dataclass
class Result:
    verdict: str
    note: str = ""
    kv_bytes: int = 0
    seconds: float = 0.0
