"""The contract between a worker and an engine.

An engine turns `EngineRequest`s into `EngineOutput`s in steps. It pushes: once per step it hands
the worker everything the step produced, so that a worker can send one frame per frontend and one
event batch per step. All methods are called on the event loop's thread; an engine that computes
on a thread of its own calls the sink on the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol

from msgspec import Struct

from serving.errors import InvalidRequest
from serving.kv_layout import KvLayout, PoolMemory
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent, Tier


class EngineSpec(Struct, frozen=True):
    """The limits and the identity of a running engine. `num_blocks` counts usable blocks; `kv_layout` is None where
    the engine moves KV by itself (TensorRT-LLM)."""

    max_model_len: int
    block_size: int
    num_blocks: int
    max_batch_size: int
    hash_salt: str
    fingerprint: str
    kv_layout: KvLayout | None
    device: str


class EngineHealth(Struct, frozen=True):
    """`failure`: why it computes nothing any more; empty while it does. `late_s`: by how many
    seconds the step under way has outlasted what such a step may take; 0 while it has not."""

    failure: str = ""
    late_s: float = 0.0


class StepSink(Protocol):
    """Receives what one step produced: outputs (may be empty), cache events in order, and load."""

    def __call__(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport, /
    ) -> None: ...


class Engine(ABC):
    """One model, ready to serve."""

    spec: EngineSpec

    @abstractmethod
    async def start(self, sink: StepSink) -> None:
        """Load and warm up; `spec` is valid afterwards. Raises OperatorError with a remedy."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> None:
        """Queue a request of phase `agg` or `prefill`; outputs arrive at the sink.

        Raises InvalidRequest (it can never run) or Overloaded (`max_waiting` reached). A request
        that does not begin within its `queue_s` ends with the error QueuedTooLong, unless the
        engine's library has a queue of its own.

        A `prefill` reports progress with outputs that have neither tokens nor finish_reason. It
        ends with its first token and `finish_reason="length"` or `"stop"`; its blocks stay held
        (see `KvBlocks.exported`) until they are released.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Stop a request in whatever phase and free its blocks at once (held exports included).

        Its last output has finish_reason "cancelled". Unknown ids are ignored.
        """

    @abstractmethod
    def load(self) -> LoadReport:
        """The engine's own figures; the worker adds its name and the KV transfers."""

    def health(self) -> EngineHealth:
        """Whether it still computes: a process that lives proves nothing."""
        return EngineHealth()

    @abstractmethod
    def snapshot(self, tier: Tier = "device") -> list[int]:
        """Hashes of all cached full blocks of a tier, consistent with the events delivered so far."""

    @abstractmethod
    async def close(self) -> None:
        """Stop stepping, free everything. Running requests end as cancelled."""


class KvReservation(Protocol):
    """Blocks reserved on a decode worker for a request whose prompt KV is about to arrive.

    Only blocks `first_block .. first_block + num_blocks` must be fetched: those before it were
    found in the local prefix cache. `cached_tokens` counts those.
    """

    first_block: int
    num_blocks: int
    cached_tokens: int

    def write(self, first: int, data: Any, /) -> None:
        """Scatter fetched blocks. `first` is relative to the prompt's block 0; `data` is a
        buffer of whole blocks in wire order (`kv_layout`). May be called from any thread."""

    def commit(self, token: int | None = None) -> None:
        """All of it is written: register the blocks for prefix hits and start decoding.

        `token` replaces the request's last one, where that was not known yet.
        """


class KvBlocks(Protocol):
    """Export and import of KV blocks, for engines whose blocks this project moves (torch)."""

    def exported(self, request_id: str) -> int:
        """Number of blocks held for a finished prefill; 0 when unknown or already released."""

    def computed(self, request_id: str) -> int:
        """Number of leading blocks of a prefill that can be read already: full ones while it is
        being computed (this may go back to 0 when it is preempted), all when it is finished."""

    def read(self, request_id: str, first: int, out: Any, /) -> None:
        """Gather computed blocks into `out` (a writable buffer of whole blocks, wire order).

        Safe from any thread: they are immutable, and kept until this returns. Raises KeyError when
        they are not there (any more).
        """

    @property
    def memory(self) -> PoolMemory | None:
        """Where all blocks are, if that is one piece of a GPU's memory."""

    def lend(self, request_id: str, first: int, count: int) -> AbstractContextManager[list[int]]:
        """Ids of computed blocks in `memory`, which keep their contents until the context ends.
        Safe from any thread. Raises KeyError as `read` does, ValueError beyond the prompt."""

    def release(self, request_id: str) -> None:
        """The decode worker has them (or never will): unpin the blocks; they stay cached."""

    def reserve(self, request: EngineRequest) -> AbstractAsyncContextManager[KvReservation]:
        """Wait for room and reserve blocks for a `decode` request.

        Leaving the context without `commit` frees them. Cancellable. Raises InvalidRequest,
        Overloaded.
        """


class BlockEngine(Engine):
    """An engine whose blocks this project moves."""

    kv: KvBlocks


class TransferringEngine(Engine):
    """An engine that moves KV by itself (TensorRT-LLM), or only pretends to (mock).

    `submit` takes all phases. The last output of a `prefill` carries transfer parameters; a
    `decode` request brings them back to another engine. When the fetch fails the engine prefills
    the prompt itself and counts it in `transfers`.

    `must_fetch`: a prefill's blocks are freed by nothing but their fetch, which is slow for the
    first time between two engines. So its parameters are `EngineTransferParams`, and `abort` of a
    `decode` takes effect only after its first output. Otherwise they are `KvTransferParams`, and
    `release` frees the blocks.
    """

    transfers: KvTransferTotals
    must_fetch = True

    def release(self, request_id: str) -> None:
        """Nobody will fetch what a finished prefill holds. Unknown ids are ignored."""


def refuse_pooling(request: EngineRequest, backend: str) -> None:
    """Raises InvalidRequest for an embedding, which engines of this kind do not compute."""
    if request.pooling is not None:
        raise InvalidRequest(
            f"the {backend} engine computes no embeddings; the torch engine does "
            "(`engine.backend: torch`)",
            code="unsupported_by_engine",
        )


def require_runnable(request: EngineRequest, max_model_len: int, vocab_size: int) -> None:
    """Raises InvalidRequest for what no engine of this context and vocabulary can ever run."""
    tokens = request.token_ids
    if not 1 <= request.num_prompt_tokens <= len(tokens):
        raise InvalidRequest("the prompt is empty", code="empty_prompt")
    if len(tokens) + (request.pooling is None) > max_model_len:
        raise InvalidRequest(
            f"{len(tokens)} tokens leave no room for output: the context is {max_model_len} tokens",
            code="context_length_exceeded",
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise InvalidRequest(f"token ids must be below {vocab_size}", code="invalid_token")
    if any(not 0 <= token < vocab_size for token, _ in request.sampling.logit_bias):
        raise InvalidRequest(
            f"token ids must be below {vocab_size}", param="logit_bias", code="invalid_token"
        )
    if request.sampling.max_tokens <= len(tokens) - request.num_prompt_tokens:
        raise InvalidRequest(
            f"max_tokens {request.sampling.max_tokens} leaves nothing to generate",
            param="max_tokens",
            code="invalid_max_tokens",
        )
