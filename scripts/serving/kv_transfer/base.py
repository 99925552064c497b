"""Moving KV blocks between workers: the contract that UCX and TCP implement.

The decode side pulls. It names a request by id and nonce (handed to it by the prefill worker
through the frontend); the prefill side answers with exactly the blocks asked for, or refuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from serving.kv_layout import KvLayout, PoolMemory
from serving.protocol import KvTransferParams

ChunkSink = Callable[[int, Any], None]
"""`sink(first_block, data)`: whole blocks in wire order, or `BlocksInPlace`; `data` is reused after
it returns. Called off the event loop's thread."""


class Progress(NamedTuple):
    """How far a prefill is: `num_blocks` can be pulled; with `token`, its first one, it is over."""

    num_blocks: int
    token: int | None = None


class BlockSource(Protocol):
    """Where the prefill side gets the bytes: checks the nonce, gathers, releases."""

    def open(self, request_id: str, nonce: str) -> int:
        """Number of blocks that are or will be held. Raises PermissionError for a wrong nonce,
        KeyError if not held."""

    async def progress(self, request_id: str, nonce: str, beyond: int) -> Progress:
        """Waits until more than `beyond` blocks are computed, or the prefill is over. Raises like
        `open`, also when the prefill ends in any other way."""

    def read(self, request_id: str, first: int, out: Any) -> None:
        """Gather whole blocks into the writable buffer `out`. Called off the event loop's thread."""

    @property
    def memory(self) -> PoolMemory | None:
        """Where all blocks are, if a peer on another GPU of this host could read them there."""

    def lend(self, request_id: str, first: int, count: int) -> AbstractContextManager[list[int]]:
        """Ids of blocks in `memory`, which keep their contents until the context ends. Raises
        KeyError when they are not held (any more)."""

    def done(self, request_id: str) -> None:
        """The peer has everything."""


class KvTransfer(ABC):
    """One per worker process: serves its own blocks and pulls from peers."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        host: str,
        chunk_bytes: int | None,
        connect_s: float,
        transfer_s: float,
        device: str = "cpu",
        in_place: bool = True,
    ) -> None:
        """`chunk_bytes` None: what suits the memory. `device` is where the engine's blocks are
        (`cpu`, `cuda`, `cuda:1`). `in_place`: a peer on another GPU of this host may read them
        where they are, whatever the transport."""
        self.layout = layout
        self.host = host
        self.chunk_bytes, self.device, self.in_place = chunk_bytes, device, in_place
        self.connect_s, self.transfer_s = connect_s, transfer_s

    address: str
    """What peers connect to, once serving: `ucx://host:port`, for example."""

    route = ""
    """What carried the blocks of the latest pull, for people: `cuda_ipc`, or `tcp`."""

    @abstractmethod
    async def serve(self, source: BlockSource) -> None:
        """Listen (on an ephemeral port of `host`) and answer pulls until `close`."""

    @abstractmethod
    async def progress(self, params: KvTransferParams, beyond: int, within_s: float) -> Progress:
        """Wait for a prefill that is going on; see `BlockSource.progress`.

        Raises KvTransferFailed, also when nothing happened `within_s`. Cancellable.
        """

    @abstractmethod
    async def pull(
        self,
        params: KvTransferParams,
        first_block: int,
        num_blocks: int,
        sink: ChunkSink,
        *,
        more_follows: bool = False,
    ) -> int:
        """Fetch `num_blocks` from `first_block` on; returns bytes received.

        Gather, transport and scatter of consecutive chunks overlap. With `num_blocks == 0` only
        tells the source that it is done, which is told after any pull unless `more_follows`. Raises KvTransferFailed on refusal, loss, or when
        `connect_s` or `transfer_s` ran out; `sink` is not called again after that. Cancellable.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close listener, endpoints and staging memory; in-flight pulls fail."""
