"""Moves the KV blocks of an engine that hands them out, over a KV transport of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine
from serving.kv_transfer import KvTransfer
from serving.protocol import EngineOutput, EngineRequest
from serving.worker.decode import DecodeEndpoint
from serving.worker.handover import Handover
from serving.worker.prefill import PrefillEndpoint


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
