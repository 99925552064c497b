"""The decode endpoint: fetches a prompt's KV, then lets the engine go on from it.

A transfer that fails is never the caller's problem: the prompt is prefilled here instead, and
counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from serving.engine.base import BlockEngine, TransferStats
from serving.errors import KvTransferFailed, ServingError
from serving.kv_transfer.base import KvTransfer
from serving.protocol import EngineOutput, EngineRequest, ErrorInfo, KvTransferParams

log = logging.getLogger(__name__)


class DecodeEndpoint:
    """Owns one task per request whose KV is on its way."""

    def __init__(
        self,
        engine: BlockEngine,
        transfer: KvTransfer,
        tasks: asyncio.TaskGroup,
        fail: Callable[[EngineOutput], None],
    ) -> None:
        self._engine, self._transfer = engine, transfer
        self._tasks, self._fail = tasks, fail
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self.stats = TransferStats()

    def submit(self, request: EngineRequest) -> None:
        """Start fetching; decoding follows by itself. Errors arrive as the request's last output."""
        task = self._tasks.create_task(self._run(request), name=f"fetch-{request.request_id}")
        self._fetching[request.request_id] = task
        task.add_done_callback(lambda _: self._fetching.pop(request.request_id, None))

    def abort(self, request_id: str) -> None:
        """Stop fetching; what the engine has of the request is the engine's to abort."""
        task = self._fetching.get(request_id)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Give up on everything that is still fetching."""
        for task in list(self._fetching.values()):
            task.cancel()

    async def _run(self, request: EngineRequest) -> None:
        try:
            try:
                await self._fetch(request)
            except KvTransferFailed as exc:
                log.warning("%s; prefilling here instead", exc)
                self.stats.failures += 1
                self.stats.local_prefills += 1
                self._engine.submit(msgspec.structs.replace(request, kv_transfer_params=None))
        except ServingError as exc:
            error = ErrorInfo(
                type(exc).__name__, str(exc), float(getattr(exc, "retry_after_s", 1.0))
            )
            self._fail(EngineOutput(request.request_id, [], finish_reason="error", error=error))

    async def _fetch(self, request: EngineRequest) -> None:
        params = request.kv_transfer_params
        if not isinstance(params, KvTransferParams):
            raise KvTransferFailed(request.request_id, "another engine", "it moves KV by itself")
        async with self._engine.kv.reserve(request) as reservation:
            started = time.monotonic()
            num_bytes = await self._transfer.pull(
                params, reservation.first_block, reservation.num_blocks, reservation.write
            )
            reservation.commit()
        self.stats.transfers += 1
        self.stats.route = self._transfer.route
        self.stats.bytes_received += num_bytes
        self.stats.seconds += time.monotonic() - started
