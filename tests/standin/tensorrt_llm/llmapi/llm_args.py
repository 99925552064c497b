"""Test code. The argument models, generated; the few checks that decide what a caller may write."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from tensorrt_llm import _contract, _generate


class CapacitySchedulerPolicy(StrEnum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(StrEnum):
    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


_generate.known(CapacitySchedulerPolicy, ContextChunkingPolicy)

# Nested models first, so that the outer ones turn plain dictionaries into them.
DynamicBatchConfig: Any = _generate.model("DynamicBatchConfig")
SchedulerConfig: Any = _generate.model("SchedulerConfig")
KvCacheConfig: Any = _generate.model("KvCacheConfig")
CacheTransceiverConfig: Any = _generate.model("CacheTransceiverConfig")
CudaGraphConfig: Any = _generate.model("CudaGraphConfig")
TorchLlmArgs: Any = _generate.model("TorchLlmArgs")
LlmArgs = TorchLlmArgs

if "TrtLlmArgs" in _contract.classes(_contract.current_version()):
    TrtLlmArgs: Any = _generate.model("TrtLlmArgs")
