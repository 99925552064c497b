"""The decode endpoint: fetches a prompt's KV, then lets the engine go on from it.

A failed transfer never fails the request, whatever it failed with: the prompt is prefilled here
instead, and counted. Nor does it ever end the worker or another fetch. When
the fetch began while the prompt was still being computed, the request goes back to the frontend
with the error. The frontend has the first token or gets it, and asks again with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from serving.engine.base import BlockEngine, KvReservation
from serving.errors import EngineFailed, KvTransferFailed, ServingError
from serving.kv_transfer import KvTransfer
from serving.load_report import KvTransferTotals
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
        self.transfers = KvTransferTotals()

    def submit(self, request: EngineRequest) -> None:
        """Start fetching; the engine decodes afterwards. Errors arrive as the last output."""
        task = self._tasks.create_task(self._run(request), name=f"fetch-{request.request_id}")
        self._fetching[request.request_id] = task
        task.add_done_callback(lambda _: self._fetching.pop(request.request_id, None))

    def abort(self, request_id: str) -> None:
        """Stop fetching. The worker aborts the request in the engine."""
        task = self._fetching.get(request_id)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Cancel all fetches."""
        for task in list(self._fetching.values()):
            task.cancel()

    @property
    def num_fetching(self) -> int:
        """Requests whose KV is on its way."""
        return len(self._fetching)

    async def _run(self, request: EngineRequest) -> None:
        try:
            try:
                await self._fetch_contained(request)
            except KvTransferFailed as exc:
                self.transfers.kv_transfer_failures += 1
                if request.follows_prefill:
                    raise
                log.warning("%s; prefilling here instead", exc)
                self.transfers.local_prefill_fallbacks += 1
                self._engine.submit(msgspec.structs.replace(request, kv_transfer_params=None))
        except ServingError as exc:
            self._refuse(request, exc)
        except Exception as exc:
            log.exception("%s could not be prefilled here", request.request_id)
            self._refuse(request, EngineFailed(f"{type(exc).__name__}: {exc}"))

    def _refuse(self, request: EngineRequest, exc: ServingError) -> None:
        error = ErrorInfo.from_error(exc)
        self._fail(EngineOutput(request.request_id, [], finish_reason="error", error=error))

    async def _fetch_contained(self, request: EngineRequest) -> None:
        """Raises ServingError only: any other exception would end the task group, and with it the
        worker and all its requests."""
        try:
            await self._fetch(request)
        except ServingError:
            raise
        except Exception as exc:
            log.exception("the KV of %s could not be fetched", request.request_id)
            params = request.kv_transfer_params
            source = params.source_instance if params is not None else "nowhere"
            why = f"{type(exc).__name__}: {exc}"
            raise KvTransferFailed(request.request_id, source, why) from exc

    async def _fetch(self, request: EngineRequest) -> None:
        params = request.kv_transfer_params
        if not isinstance(params, KvTransferParams):
            raise KvTransferFailed(request.request_id, "another engine", "it moves KV by itself")
        if request.follows_prefill:
            # Room for the token that the prefill will end with; its value does not matter yet.
            token_ids = [*request.token_ids, request.token_ids[-1]]
            request = msgspec.structs.replace(request, token_ids=token_ids)
        async with self._engine.kv.reserve(request) as reservation:
            end = reservation.first_block + reservation.num_blocks
            if request.follows_prefill:
                token, first = await self._pull_while_computed(request, params, reservation)
            else:
                token, first = None, reservation.first_block
            await self._pull(params, first, end - first, reservation, more_follows=False)
            reservation.commit(token)
        self.transfers.kv_transfers += 1
        self.transfers.kv_route = self._transfer.route

    async def _pull_while_computed(
        self, request: EngineRequest, params: KvTransferParams, reservation: KvReservation
    ) -> tuple[int, int]:
        """Fetch blocks while the prefill computes them. Returns its token and the first block that
        is not fetched yet, when the prefill is over."""
        first = reservation.first_block
        end = first + reservation.num_blocks
        while True:
            progress = await self._transfer.progress(params, first, request.deadline_s)
            if progress.token is not None:
                return progress.token, first
            count = min(progress.num_blocks, end) - first
            if count <= 0:
                raise KvTransferFailed(request.request_id, params.source_instance, "no progress")
            await self._pull(params, first, count, reservation, more_follows=True)
            first += count

    async def _pull(
        self,
        params: KvTransferParams,
        first: int,
        count: int,
        reservation: KvReservation,
        *,
        more_follows: bool,
    ) -> None:
        started = time.monotonic()
        self.transfers.kv_bytes_received += await self._transfer.pull(
            params, first, count, reservation.write, more_follows=more_follows
        )
        self.transfers.kv_transfer_seconds += time.monotonic() - started
