"""How a prompt's KV gets from a prefill worker to a decode worker: by us, or by the engine.

A worker has one handover. `BlockHandover` moves the blocks of a `BlockEngine` over a KV
transport; `EngineHandover` passes the requests to an engine that moves KV by itself.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.kv_transfer import KvTransfer
from serving.load_report import KvTransferTotals
from serving.protocol import EngineOutput, EngineRequest
from serving.worker.decode import DecodeEndpoint
from serving.worker.prefill import PrefillEndpoint


class Handover(ABC):
    """Stands between the worker and its engine for requests of the phases prefill and decode.

    `address` is where decode workers fetch KV; empty: the engine has its own. `num_held` counts
    requests whose KV waits to be fetched.
    """

    address = ""
    transfers: KvTransferTotals
    num_held = 0

    async def serve(self) -> None:  # noqa: B027, an engine listens by itself
        """Let decode workers fetch. Raises OperatorError when the transport is not available."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""

    def on_output(self, output: EngineOutput) -> EngineOutput | None:
        """Sees every output of the engine. Returns what the frontend gets; None: nothing."""
        return output

    def abort(self, request_id: str) -> None:  # noqa: B027, an engine aborts by itself
        """Forget the request. The worker aborts it in the engine."""

    def release(self, request_id: str) -> None:  # noqa: B027
        """No decode worker will fetch the KV of a finished prefill: free it."""

    async def close(self) -> None:  # noqa: B027
        """Stop listening, and cancel running fetches."""


def make_handover(
    settings: WorkerSettings,
    epoch: int,
    engine: BlockEngine | TransferringEngine,
    tasks: asyncio.TaskGroup,
    send: Callable[[EngineOutput], None],
) -> Handover:
    """The handover that fits the engine, which has started. `send` delivers outputs that no
    engine step produced; `tasks` own the fetches."""
    if isinstance(engine, BlockEngine):
        return BlockHandover(settings, epoch, engine, tasks, send)
    return EngineHandover(engine)


class BlockHandover(Handover):
    """The prefill endpoint, the decode endpoint and the transport between them."""

    def __init__(
        self,
        settings: WorkerSettings,
        epoch: int,
        engine: BlockEngine,
        tasks: asyncio.TaskGroup,
        send: Callable[[EngineOutput], None],
    ) -> None:
        layout = engine.spec.kv_layout
        assert layout is not None, "a block engine has a layout"
        config = settings.kv_transfer
        self._engine = engine
        self._transfer = KvTransfer(
            config, layout, host=settings.kv_host, device=engine.spec.device
        )
        self._prefill = PrefillEndpoint(
            engine,
            instance_id=settings.instance_id,
            epoch=epoch,
            hold_s=config.hold_s,
            overlap=config.overlap,
            address=lambda: self._transfer.address,
        )
        self._decode = DecodeEndpoint(engine, self._transfer, tasks, send)
        self.transfers = self._decode.transfers
        self.transfers.kv_transport = config.transport

    async def serve(self) -> None:
        await self._transfer.serve(self._prefill)
        self.address = self._transfer.address

    @property
    def num_held(self) -> int:  # type: ignore[override]
        return self._prefill.num_held

    @property
    def num_fetching(self) -> int:
        """Requests whose KV is on its way to this worker."""
        return self._decode.num_fetching

    def submit(self, request: EngineRequest) -> None:
        if request.phase == "prefill":
            self._prefill.submit(request)
        elif request.kv_transfer_params is not None:
            self._decode.submit(request)
        else:
            self._engine.submit(request)

    def on_output(self, output: EngineOutput) -> EngineOutput | None:
        return self._prefill.on_output(output)

    def abort(self, request_id: str) -> None:
        self._prefill.abort(request_id)
        self._decode.abort(request_id)

    def release(self, request_id: str) -> None:
        self._prefill.done(request_id)

    async def close(self) -> None:
        self._decode.close()
        await self._transfer.close()


class EngineHandover(Handover):
    """Passes requests to an engine that moves KV by itself; see `TransferringEngine`."""

    def __init__(self, engine: TransferringEngine) -> None:
        self._engine = engine
        self.transfers = engine.transfers

    def submit(self, request: EngineRequest) -> None:
        self._engine.submit(request)

    def release(self, request_id: str) -> None:
        self._engine.release(request_id)
