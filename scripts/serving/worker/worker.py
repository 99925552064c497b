"""One worker: joins engine, endpoints, direct connections and event plane.

This is the only place that sees all of them. Once per engine step it turns what the step
produced into one frame per frontend, one event batch and one load report.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from serving.config.process import WorkerSettings
from serving.engine.base import Engine
from serving.errors import Overloaded
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent
from serving.rpc import RpcServer
from serving.rpc.handshake import read_secret
from serving.worker.handover import Handover

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.5
"""An idle worker says that it is idle this often; a busy one reports with its steps."""


class Worker:
    """Implements `rpc.RpcHandler`; `on_step` is the engine's sink."""

    def __init__(
        self,
        process: WorkerSettings,
        epoch: int,
        engine: Engine,
        events: EventPlane,
    ) -> None:
        self.engine, self._events = engine, events
        self._instance_id, self._epoch = process.instance_id, epoch
        self.rpc = RpcServer(
            self,
            process.instance_id,
            epoch,
            secret=read_secret(process.control.rpc_secret_file),
        )
        self.handover: Handover
        self._draining = False

    def send(self, output: EngineOutput) -> None:
        """For outputs that come from elsewhere than the engine's steps."""
        self.rpc.send([output])

    # --- from frontends ------------------------------------------------------------------------

    def on_generate(self, request: EngineRequest) -> None:
        if self._draining:
            raise Overloaded(f"{self._instance_id} is draining")
        if request.phase == "agg":
            self.engine.submit(request)
        else:
            self.handover.submit(request)

    def on_abort(self, request_id: str) -> None:
        self.handover.abort(request_id)
        self.engine.abort(request_id)

    def on_release(self, request_id: str) -> None:
        self.handover.release(request_id)

    # --- from the engine -----------------------------------------------------------------------

    def on_step(self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport) -> None:
        if outputs:
            finished = map(self.handover.finish, outputs)
            self.rpc.send([output for output in finished if output is not None])
        if events:
            self._events.publish_kv(events, self._report(load))
        else:
            self._events.publish_load(self._report(load))

    def _report(self, load: LoadReport) -> LoadReport:
        """The engine's own figures, with this worker's name and KV transfers."""
        return msgspec.structs.replace(
            load,
            instance_id=self._instance_id,
            epoch=self._epoch,
            **msgspec.structs.asdict(self.handover.transfers),
        )

    # --- life ----------------------------------------------------------------------------------

    async def report_forever(self) -> None:
        """Keep frontends informed while no step does; also a new frontend's first news."""
        while True:
            self._events.publish_load(self._report(self.engine.load()))
            await asyncio.sleep(REPORT_INTERVAL_S)

    def start_draining(self) -> None:
        """Accept nothing more, and let all frontends know."""
        self._draining = True
        self.rpc.announce_drain()

    async def drain(self, drain_s: float) -> None:
        """Wait for running requests to finish and for held KV to be fetched."""
        deadline = time.monotonic() + drain_s
        while self.rpc.num_live or self.handover.num_held:
            if time.monotonic() > deadline:
                left = self.rpc.num_live, self.handover.num_held
                log.warning("%g s of draining leave %d requests, and KV of %d", drain_s, *left)
                return
            await asyncio.sleep(0.05)
