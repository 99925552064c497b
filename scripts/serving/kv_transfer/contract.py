"""What a worker provides so that peers can pull its blocks, and how pulled blocks reach it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from serving.kv_layout import PoolMemory

ChunkSink = Callable[[int, Any], None]
"""`sink(first_block, data)`: `data` holds whole blocks in wire order, or is a `BlocksInPlace`. It is
reused after the call returns. Called off the event loop's thread."""


class PrefillProgress(NamedTuple):
    """`num_blocks` can be pulled. `token` is the first generated token; once it is set, the prefill
    has ended."""

    num_blocks: int
    token: int | None = None


class BlockSource(Protocol):
    """The prefill worker's blocks: checks nonces, gathers, and releases."""

    def open(self, request_id: str, nonce: str) -> int:
        """Number of blocks that the request holds, or will hold when its prefill ends.

        Raises PermissionError for a wrong nonce, KeyError for a request that holds nothing.
        """

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        """Wait until more than `beyond` blocks are computed, or the prefill has ended.

        Raises like `open`, also when the prefill fails or is aborted.
        """

    def read(self, request_id: str, first: int, out: Any) -> None:
        """Gather whole blocks, from block `first` on, into the writable buffer `out`.

        Called off the event loop's thread.
        """

    @property
    def memory(self) -> PoolMemory | None:
        """The engine's pool, if a peer on another GPU of this host may read blocks there."""

    def lend(self, request_id: str, first: int, count: int) -> AbstractContextManager[list[int]]:
        """Ids of `count` blocks in `memory`, which keep their contents until the context ends.

        Raises KeyError when the request no longer holds them.
        """

    def done(self, request_id: str) -> None:
        """The peer has all blocks; they can be released."""
