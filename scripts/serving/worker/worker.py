"""One worker: joins the engine, the KV handover, the frontends' connections and the event plane.

This is the only place that sees all of them. Once per engine step it sends one frame per frontend,
one event batch and one load report.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.errors import Overloaded
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, ErrorInfo, KvEvent
from serving.rpc import RpcServer
from serving.rpc.handshake import read_secret
from serving.worker.handover import make_handover

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.5
"""How often an idle worker reports its load; a busy one reports with its steps."""


class Worker:
    """Implements `rpc.RpcHandler`; `on_step` is the sink of the engine, which has started."""

    def __init__(
        self,
        settings: WorkerSettings,
        epoch: int,
        engine: BlockEngine | TransferringEngine,
        events: EventPlane,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings, self._epoch = settings, epoch
        self._engine, self._events = engine, events
        self.rpc = RpcServer(
            self,
            settings.instance_id,
            epoch,
            secret=read_secret(settings.control.rpc_secret_file),
            late_s=lambda: engine.health().late_s,
        )
        self.handover = make_handover(settings, epoch, engine, tasks, self._send)
        self._draining = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[list[str]]:
        """Let decode workers fetch KV and frontends connect, until the context ends.

        Yields the addresses for frontends. Raises OperatorError.
        """
        async with AsyncExitStack() as stack:
            await self.handover.serve()
            stack.push_async_callback(self.handover.close)
            addresses = await self.rpc.start(self._settings.host, self._settings.unix_socket)
            stack.push_async_callback(self.rpc.close)
            yield addresses

    # --- from frontends ------------------------------------------------------------------------

    def on_generate(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""
        if self._draining:
            raise Overloaded(f"{self._settings.instance_id} is draining")
        if request.phase == "agg":
            self._engine.submit(request)
        else:
            self.handover.submit(request)

    def on_abort(self, request_id: str) -> None:
        self.handover.abort(request_id)
        self._engine.abort(request_id)

    def on_release(self, request_id: str) -> None:
        self.handover.release(request_id)

    # --- from the engine -----------------------------------------------------------------------

    def on_step(self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport) -> None:
        """Pass on what one engine step produced."""
        if outputs:
            passed = map(self._passed_on, outputs)
            self.rpc.send([output for output in passed if output is not None])
        if events:
            self._events.publish_kv(events, self._report(load))
        else:
            self._events.publish_load(self._report(load))

    def _passed_on(self, output: EngineOutput) -> EngineOutput | None:
        """What the frontend gets of an output. A failure here ends this request and no other."""
        try:
            return self.handover.on_output(output)
        except Exception as exc:
            log.exception("an output of %s could not be handed over", output.request_id)
            self._abort_quietly(output.request_id)
            error = ErrorInfo("EngineFailed", f"{type(exc).__name__}: {exc}")
            return EngineOutput(output.request_id, [], "error", error=error)

    def _abort_quietly(self, request_id: str) -> None:
        try:
            self.on_abort(request_id)
        except Exception:
            log.exception("%s could not be aborted", request_id)

    def _send(self, output: EngineOutput) -> None:
        """Send an output that no engine step produced."""
        self.rpc.send([output])

    def _report(self, load: LoadReport) -> LoadReport:
        """The engine's own figures, with this worker's name and KV transfers."""
        return msgspec.structs.replace(
            load,
            instance_id=self._settings.instance_id,
            epoch=self._epoch,
            **msgspec.structs.asdict(self.handover.transfers),
        )

    # --- life ----------------------------------------------------------------------------------

    async def report_forever(self) -> None:
        """Report the load while no step does; a new frontend learns it this way too."""
        while True:
            self._events.publish_load(self._report(self._engine.load()))
            await asyncio.sleep(REPORT_INTERVAL_S)

    def start_draining(self) -> None:
        """Accept no more requests, and let all frontends know."""
        self._draining = True
        self.rpc.announce_drain()

    async def drain(self, drain_s: float) -> None:
        """Wait until running requests are finished and held KV is fetched."""
        deadline = time.monotonic() + drain_s
        while self.rpc.num_live or self.handover.num_held:
            if time.monotonic() > deadline:
                log.warning(
                    "%d requests still run after %g s of draining, and the KV of %d is not fetched",
                    self.rpc.num_live,
                    drain_s,
                    self.handover.num_held,
                )
                return
            await asyncio.sleep(0.05)
