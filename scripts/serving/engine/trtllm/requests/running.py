"""One request in the adapter: what it waits for, and what of it is still to be told."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct

from serving.engine.trtllm.requests.prefilled_kv import PrefilledKv
from serving.protocol import EngineRequest


class Runtime(Struct):
    """What of the library a request needs: its `LLM`, and classes by their own names."""

    llm: Any
    sampling_params: Any
    disaggregated_params: Any
    logprob: Any  # None in versions without
    guided_decoding_params: Any


class Running:
    """One request. `is_open`: its last output is still to be told.

    `handover` is set while its KV is to be fetched, `has_begun` with the library's first answer.
    `num_cached` waits to be told with the first output.
    """

    __slots__ = (
        "handover",
        "has_begun",
        "is_aborted",
        "is_open",
        "is_stopping",
        "num_cached",
        "num_queued",
        "request",
        "result",
        "task",
        "timer",
    )

    def __init__(self, request: EngineRequest, handover: PrefilledKv | None) -> None:
        self.request, self.handover = request, handover
        self.num_queued = 0 if handover else len(request.token_ids)
        self.num_cached: int | None = None
        self.is_open, self.has_begun, self.is_aborted, self.is_stopping = True, False, False, False
        self.result: Any = None
        self.task: asyncio.Task[None]
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_fetching(self) -> bool:
        return self.handover is not None and not self.has_begun
