"""Test code. DisaggregatedParams: what a context hands to a generation, fields per version."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from tensorrt_llm import _contract, _generate

_REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")

if "schedule_style" in _contract.members("DisaggregatedParams"):

    class DisaggScheduleStyle(IntEnum):
        CONTEXT_FIRST = 0
        GENERATION_FIRST = 1


class _Rules:
    __slots__ = ()

    def __post_init__(self: Any) -> None:
        if self.request_type is None:
            return
        self.request_type = self.request_type.lower()
        if self.request_type not in _REQUEST_TYPES:
            raise ValueError(f"Unknown request type: {self.request_type}")


DisaggregatedParams: Any = _generate.record(
    "DisaggregatedParams", "tensorrt_llm.disaggregated_params", bases=(_Rules,), kw_only=True
)
