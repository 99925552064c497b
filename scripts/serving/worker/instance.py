"""The life of one instance: load the engine, listen, register, serve, drain.

The order matters. An instance registers last, when it can serve, and unregisters first, before it
stops accepting requests. Everything that it opens closes in the reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from serving.config.process import WorkerSettings, collect_rarely
from serving.discovery import Discovery
from serving.engine.base import TransferringEngine
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, InstanceInfo, KvEvent
from serving.worker.engines import load_engine, model_card
from serving.worker.health import watch_engine
from serving.worker.worker import Worker

log = logging.getLogger("serving.worker")

REGISTER_DEADLINE_S = 60.0


async def serve(
    settings: WorkerSettings, stop: asyncio.Event, registered: Callable[[InstanceInfo], None]
) -> None:
    """Serve until `stop` is set and the last request is over.

    `registered` is called once requests can be routed to the instance. Raises OperatorError.
    """
    epoch = time.time_ns()
    engine, manifest = load_engine(settings)
    control = settings.control

    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(control.nats_url, control.namespace, Path(control.nats_token_file))
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        worker: Worker | None = None

        def sink(outputs: list[EngineOutput], cache: list[KvEvent], load: LoadReport) -> None:
            if worker is not None:  # nobody waits for the steps of the warm-up
                worker.on_step(outputs, cache, load)

        log.info("loading %s", settings.engine_dir)
        await engine.start(sink)
        stack.push_async_callback(engine.close)
        worker = Worker(settings, epoch, engine, events, tasks)
        addresses = await stack.enter_async_context(worker.listening())
        await events.serve_snapshots(
            settings.instance_id, epoch, engine.snapshot, lambda: engine.snapshot("host")
        )
        health = watch_engine(engine, settings.instance_id, settings.hang_s, worker.rpc.close)
        for work, name in ((worker.report_forever(), "load-reports"), (health, "engine-health")):
            stack.callback(tasks.create_task(work, name=name).cancel)

        discovery = await stack.enter_async_context(Discovery.from_settings(control))
        info = InstanceInfo(
            instance_id=settings.instance_id,
            epoch=epoch,
            role=settings.role,
            rpc_addresses=addresses,
            kv_address=worker.handover.address,
            model=model_card(settings, manifest, engine.spec),
            num_blocks=engine.spec.num_blocks,
            max_batch_size=engine.spec.max_batch_size,
            pid=os.getpid(),
            host=socket.gethostname(),
            kv_by_engine=isinstance(engine, TransferringEngine) and engine.must_fetch,
        )
        collect_rarely()
        await discovery.register(info, deadline_s=REGISTER_DEADLINE_S)
        registered(info)
        log.info(
            "ready: %s at %s, KV %s", info.instance_id, addresses, info.kv_address or "by engine"
        )

        await stop.wait()
        log.info("%s drains", settings.instance_id)
        # Before it unregisters, so that frontends know why it does and keep their connections.
        worker.start_draining()
        await discovery.unregister()
        await worker.drain(settings.drain_s)
