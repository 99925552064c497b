"""What all requests of one TensorRT-LLM engine share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from serving.config import EngineConfig
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.requests.sampling import Vocabulary
from serving.errors import KvTransferFailed
from serving.load_report import KvTransferTotals

log = logging.getLogger(__name__)

ABORT_S = 30.0
"""An aborted request is dropped when the library does not report its end within this time."""


class Runtime(Struct):
    """The parts of the library that a request needs: its `LLM`, and classes by their own names."""

    llm: Any
    sampling_params: Any
    disaggregated_params: Any
    logprob: Any  # None in versions without
    guided_decoding_params: Any


class RequestContext(Struct, kw_only=True):
    """The engine's parts and settings, and counts of its requests.

    `guide_backend` enforces guides; None: nothing does. A fetch counts as over after `fetch_s`.
    `num_cached` estimates the cached tokens of a prompt, for versions that do not report them.
    `suspect` is called when the library misbehaves. `has_output` becomes True with any output;
    the health check sets it back.
    """

    runtime: Runtime
    outbox: Outbox
    instance_id: str
    limits: EngineConfig
    vocabulary: Vocabulary
    guide_backend: str | None
    fetch_s: float
    transfers: KvTransferTotals
    num_cached: Callable[[list[int]], int]
    suspect: Callable[[], None]
    abort_s: float = ABORT_S

    queued_tokens: int = 0
    has_output: bool = False
    num_unanswered_aborts: int = 0

    def count_failed_transfer(self, exc: KvTransferFailed, *, is_computed_here: bool) -> None:
        """A fetch failed; the prompt is prefilled here, unless its caller has gone."""
        log.warning("%s; %s", exc, "prefilling here instead" if is_computed_here else "not wanted")
        self.transfers.kv_transfer_failures += 1
        self.transfers.local_prefill_fallbacks += is_computed_here
