"""What transfers see of the engine: held blocks to read, reserved blocks to fill.

Blocks are copied on transfer threads while the event loop may release them. Each sequence's
`transfer_lock` keeps the two apart: a release waits for the copy of one chunk at most, and a
copy never touches blocks that were given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from serving.engine.torch.kv_pool import KvPool
from serving.engine.torch.scheduler import Scheduler
from serving.engine.torch.sequence import Sequence, State
from serving.errors import EngineFailed, InvalidRequest
from serving.protocol import EngineRequest, KvTransferParams


class Books(Protocol):
    """The part of the engine that is needed here."""

    def new_sequence(self, request: EngineRequest) -> Sequence: ...

    def change(self, action: Callable[[], None]) -> None: ...

    def on_loop(self, callback: Callable[[], object]) -> None: ...


class TorchReservation:
    """See `base.KvReservation`."""

    def __init__(self, blocks: TorchKvBlocks, sequence: Sequence) -> None:
        self._owner, self._sequence = blocks, sequence
        self.first_block = sequence.num_stored
        self.num_blocks = len(sequence.blocks) - self.first_block
        self.cached_tokens = sequence.num_computed

    def write(self, first: int, data: Any, /) -> None:
        self._owner.write(self._sequence, first, data)

    def commit(self) -> None:
        self._owner.commit(self._sequence)


class TorchKvBlocks:
    """See `base.KvBlocks`."""

    def __init__(self, books: Books, scheduler: Scheduler, pool: KvPool) -> None:
        self._books, self._scheduler, self._pool = books, scheduler, pool
        self._reserved: dict[str, Sequence] = {}

    # --- prefill side --------------------------------------------------------------------------

    def exported(self, request_id: str) -> int:
        sequence = self._scheduler.exported.get(request_id)
        return 0 if sequence is None else len(sequence.blocks)

    def read(self, request_id: str, first: int, out: Any, /) -> None:
        sequence = self._scheduler.exported.get(request_id)
        if sequence is None:
            raise KeyError(request_id)
        with sequence.transfer_lock:
            if sequence.state is not State.EXPORTED:
                raise KeyError(request_id)
            self._pool.gather(self._slice(sequence, first, out), out)

    def release(self, request_id: str) -> None:
        self._take_back(request_id, lambda: self._scheduler.release_export(request_id))

    # --- decode side ---------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> AbstractAsyncContextManager[TorchReservation]:
        return self._reserve(request)

    @asynccontextmanager
    async def _reserve(self, request: EngineRequest) -> AsyncIterator[TorchReservation]:
        params = request.kv_transfer_params
        if len(request.token_ids) < 2 or (
            isinstance(params, KvTransferParams) and params.num_tokens != len(request.token_ids) - 1
        ):
            raise InvalidRequest("KV is fetched for all tokens but the last one")
        sequence = self._books.new_sequence(request)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sequence.on_settled = lambda: self._books.on_loop(
            lambda: None if settled.done() else settled.set_result(None)
        )
        self._books.change(lambda: self._scheduler.add(sequence))
        self._reserved[request.request_id] = sequence
        try:
            await settled
            if sequence.state is not State.RESERVED:
                raise EngineFailed(f"{request.request_id} was aborted while it waited for room")
            yield TorchReservation(self, sequence)
        finally:
            if self._reserved.get(request.request_id) is sequence:  # the id may be in use again
                del self._reserved[request.request_id]
            if sequence.state in (State.WAITING, State.RESERVED) and sequence.is_reservation:
                with sequence.transfer_lock:
                    self._books.change(lambda: self._scheduler.discard(sequence))

    def write(self, sequence: Sequence, first: int, data: Any) -> None:
        """Data for a request that was aborted meanwhile is dropped."""
        with sequence.transfer_lock:
            if sequence.state is State.RESERVED:
                self._pool.scatter(self._slice(sequence, first, data), data)

    def commit(self, sequence: Sequence) -> None:
        """Without effect for a request that was aborted meanwhile: that was told already."""
        if sequence.state is State.RESERVED:
            self._books.change(lambda: self._scheduler.commit(sequence))

    # --- both ----------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        self._take_back(request_id, lambda: self._scheduler.abort(request_id))

    def cancel_all(self) -> None:
        """End every request and every hold, each when the copy under way is over."""
        for request_id in self._scheduler.request_ids():
            self.abort(request_id)

    def _take_back(self, request_id: str, action: Callable[[], None]) -> None:
        sequence = self._scheduler.exported.get(request_id) or self._reserved.get(request_id)
        if sequence is None:
            self._books.change(action)
            return
        with sequence.transfer_lock:
            self._books.change(action)

    def _slice(self, sequence: Sequence, first: int, buffer: Any) -> list[int]:
        num_bytes = (
            buffer.nbytes if hasattr(buffer, "nbytes") else len(memoryview(buffer).cast("B"))
        )
        count, rest = divmod(num_bytes, self._pool.layout.block_bytes)
        if rest or first < 0 or first + count > len(sequence.blocks):
            raise ValueError(
                f"{num_bytes} bytes from block {first} do not match {len(sequence.blocks)} blocks "
                f"of {self._pool.layout.block_bytes} bytes"
            )
        return sequence.blocks[first : first + count]
