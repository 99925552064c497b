"""How a prompt's KV gets from a prefill worker to a decode worker: by us, or by the engine.

A worker has one handover. `BlockHandover` moves the blocks of a `BlockEngine` over a KV
transport; `EngineHandover` only lets the requests through to an engine that moves KV by itself.
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
    """Stands between the worker and its engine for requests of the phases prefill and decode."""

    address = ""
    transfers: KvTransferTotals
    num_held = 0

    @abstractmethod
    def submit(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""

    def finish(self, output: EngineOutput) -> EngineOutput | None:
        """Every output of the engine passes here on its way to the frontend, or ends here."""
        return output

    def abort(self, request_id: str) -> None:  # noqa: B027, nothing to forget is an answer
        """Forget the request; the engine is told by the worker."""

    def release(self, request_id: str) -> None:  # noqa: B027
        """Nobody will fetch what a finished prefill holds."""

    async def close(self) -> None:  # noqa: B027
        """Give up what is under way."""


class BlockHandover(Handover):
    """The prefill endpoint, the decode endpoint and the transport between them."""

    def __init__(
        self,
        process: WorkerSettings,
        epoch: int,
        engine: BlockEngine,
        tasks: asyncio.TaskGroup,
        send: Callable[[EngineOutput], None],
    ) -> None:
        layout = engine.spec.kv_layout
        assert layout is not None, "a block engine has a layout"
        settings = process.kv_transfer
        self._engine = engine
        self._transfer = KvTransfer(
            settings, layout, host=process.kv_host, device=engine.spec.device
        )
        self._prefill = PrefillEndpoint(
            engine,
            instance_id=process.instance_id,
            epoch=epoch,
            hold_s=settings.hold_s,
            overlap=settings.overlap,
            address=lambda: self._transfer.address,
        )
        self._decode = DecodeEndpoint(engine, self._transfer, tasks, send)
        self.transfers = self._decode.transfers
        self.transfers.kv_transport = settings.transport

    async def serve(self) -> None:
        """Let peers fetch. Raises OperatorError when the transport cannot be had."""
        await self._transfer.serve(self._prefill)
        self.address = self._transfer.address

    @property
    def num_held(self) -> int:  # type: ignore[override]
        return self._prefill.num_held

    def submit(self, request: EngineRequest) -> None:
        if request.phase == "prefill":
            self._prefill.submit(request)
        elif request.kv_transfer_params is not None:
            self._decode.submit(request)
        else:
            self._engine.submit(request)

    def finish(self, output: EngineOutput) -> EngineOutput | None:
        return self._prefill.finish(output)

    def abort(self, request_id: str) -> None:
        self._prefill.abort(request_id)
        self._decode.abort(request_id)

    def release(self, request_id: str) -> None:
        self._prefill.done(request_id)

    async def close(self) -> None:
        self._decode.close()
        await self._transfer.close()


class EngineHandover(Handover):
    """The engine does it all; `TransferringEngine` says on what terms."""

    def __init__(self, engine: TransferringEngine) -> None:
        self._engine = engine
        self.transfers = engine.transfers

    def submit(self, request: EngineRequest) -> None:
        self._engine.submit(request)

    def release(self, request_id: str) -> None:
        self._engine.release(request_id)
