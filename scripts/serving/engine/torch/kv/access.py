"""Transfers' access to the engine: held blocks to read, reserved blocks to fill.

Transfer threads copy blocks while others may release them. Blocks to read are lent: they keep a
reference of their own until the copy is over. Blocks to write belong to a reservation, whose
`transfer_lock` keeps copy and release apart: a release waits for one chunk at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any

from serving.engine.core.sequence import Sequence, State
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.shared_scheduler import SharedScheduler
from serving.errors import EngineFailed, InvalidRequest
from serving.kv_layout import PoolMemory
from serving.protocol import EngineRequest, KvTransferParams


class TorchReservation:
    """See `base.KvReservation`."""

    def __init__(self, blocks: TorchKvBlocks, sequence: Sequence) -> None:
        self._owner, self._sequence = blocks, sequence
        self.first_block = sequence.num_stored
        self.num_blocks = len(sequence.blocks) - self.first_block
        self.cached_tokens = sequence.num_computed

    def write(self, first: int, data: Any, /) -> None:
        self._owner.write(self._sequence, first, data)

    def commit(self, token: int | None = None) -> None:
        self._owner.commit(self._sequence, token)


class TorchKvBlocks:
    """See `base.KvBlocks`."""

    def __init__(
        self,
        new_sequence: Callable[[EngineRequest], Sequence],
        shared: SharedScheduler,
        pool: KvPool,
    ) -> None:
        self._new_sequence, self._shared, self._pool = new_sequence, shared, pool
        self._scheduler = shared.scheduler
        self._reserved: dict[str, Sequence] = {}

    # --- finished prefills --------------------------------------------------------------------------

    def exported(self, request_id: str) -> int:
        sequence = self._scheduler.exported.get(request_id)
        return 0 if sequence is None else len(sequence.blocks)

    def computed(self, request_id: str) -> int:
        with self._shared.locked():
            return self._scheduler.num_exportable(request_id)

    def read(self, request_id: str, first: int, out: Any, /) -> None:
        with self.lend(request_id, first, self._count(out)) as blocks:
            self._pool.gather(blocks, out)

    @property
    def memory(self) -> PoolMemory | None:
        return self._pool.memory

    @contextmanager
    def lend(self, request_id: str, first: int, count: int) -> Iterator[list[int]]:
        with self._shared.locked():
            blocks = self._scheduler.lend(request_id, first, count)
        try:
            yield blocks
        finally:
            with self._shared.locked():
                self._scheduler.take_back(blocks)
                is_awaited = bool(self._scheduler.waiting)
            if is_awaited:  # a waiting request may fit now that the last reference is gone
                self._shared.on_loop(lambda: self._shared.change(lambda: None))

    def release(self, request_id: str) -> None:
        self._shared.change(lambda: self._scheduler.release_export(request_id))

    # --- reservations ---------------------------------------------------------------------------

    def reserve(self, request: EngineRequest) -> AbstractAsyncContextManager[TorchReservation]:
        return self._reserve(request)

    @asynccontextmanager
    async def _reserve(self, request: EngineRequest) -> AsyncIterator[TorchReservation]:
        params = request.kv_transfer_params
        if len(request.token_ids) < 2 or (
            isinstance(params, KvTransferParams) and params.num_tokens != len(request.token_ids) - 1
        ):
            raise InvalidRequest("KV is fetched for all tokens but the last one")
        sequence = self._new_sequence(request)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sequence.on_settled = lambda: self._shared.on_loop(
            lambda: None if settled.done() else settled.set_result(None)
        )
        self._shared.change(lambda: self._scheduler.add(sequence))
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
                    self._shared.change(lambda: self._scheduler.discard(sequence))

    def write(self, sequence: Sequence, first: int, data: Any) -> None:
        """Data for a request that was aborted meanwhile is dropped."""
        with sequence.transfer_lock:
            if sequence.state is State.RESERVED:
                self._pool.scatter(self._slice(sequence, first, data), data)

    def commit(self, sequence: Sequence, token: int | None = None) -> None:
        """Without effect for a request that was aborted meanwhile: its end was reported already."""
        if sequence.state is State.RESERVED:
            self._shared.change(lambda: self._scheduler.commit(sequence, token))

    # --- both ----------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        sequence = self._reserved.get(request_id)
        with sequence.transfer_lock if sequence is not None else nullcontext():
            self._shared.change(lambda: self._scheduler.abort(request_id))

    def cancel_all(self) -> None:
        """End every request and every hold, each when the copy under way is over."""
        for request_id in self._scheduler.request_ids():
            self.abort(request_id)

    def _slice(self, sequence: Sequence, first: int, buffer: Any) -> list[int]:
        count = self._count(buffer)
        if first < 0 or first + count > len(sequence.blocks):
            raise ValueError(
                f"{count} blocks from block {first} do not match {len(sequence.blocks)} blocks"
            )
        return sequence.blocks[first : first + count]

    def _count(self, buffer: Any) -> int:
        num_bytes = (
            buffer.nbytes if hasattr(buffer, "nbytes") else len(memoryview(buffer).cast("B"))
        )
        count, rest = divmod(num_bytes, self._pool.layout.block_bytes)
        if rest:
            raise ValueError(
                f"{num_bytes} bytes are not whole blocks of {self._pool.layout.block_bytes} bytes"
            )
        return count
