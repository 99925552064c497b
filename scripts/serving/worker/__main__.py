"""`python -m serving.worker FILE`: build the parts, register, serve, drain.

A process may host several instances, which share its event loop and nothing else. Order matters: an
instance is registered last, when it can serve, and unregistered first, before
it stops accepting.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop

from serving.config.process import WorkerSettings, announce_ready, collect_rarely, read_settings
from serving.discovery import Discovery
from serving.engine.base import BlockEngine, TransferringEngine
from serving.errors import OperatorError
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, InstanceInfo, KvEvent
from serving.worker.engines import load_engine
from serving.worker.handover import BlockHandover, EngineHandover
from serving.worker.worker import Worker

log = logging.getLogger("serving.worker")

REGISTER_DEADLINE_S = 60.0


async def run(process: WorkerSettings) -> None:
    """Serve until SIGTERM or SIGINT; then drain and leave nothing behind."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    instances = process.instances()
    epochs: dict[str, int] = {}

    def registered(instance: WorkerSettings, epoch: int) -> None:
        epochs[instance.instance_id] = epoch
        if len(epochs) == len(instances):
            own = epochs[process.instance_id]
            announce_ready(process.ready_file, instance_id=process.instance_id, epoch=own)

    async with asyncio.TaskGroup() as tasks:
        for instance in instances:
            tasks.create_task(serve(instance, stop, registered), name=instance.instance_id)
    log.info("stopped")


async def serve(
    process: WorkerSettings, stop: asyncio.Event, registered: Callable[[WorkerSettings, int], None]
) -> None:
    """One instance, from loading its engine to the end of its last request after `stop`.

    `registered` is told its epoch once it can be routed to. Raises OperatorError.
    """
    epoch = time.time_ns()
    engine, card = load_engine(process)
    token_file = Path(process.control.nats_token_file)

    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(process.control.nats_url, process.control.namespace, token_file)
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        worker: Worker | None = None

        def sink(outputs: list[EngineOutput], cache: list[KvEvent], load: LoadReport) -> None:
            if worker is not None:  # steps of the warm-up concern nobody
                worker.on_step(outputs, cache, load)

        log.info("loading %s", process.engine_dir)
        await engine.start(sink)
        stack.push_async_callback(engine.close)
        worker = Worker(process, epoch, engine, events)
        if isinstance(engine, BlockEngine):
            worker.handover = handover = BlockHandover(process, epoch, engine, tasks, worker.send)
            await handover.serve()
        else:
            assert isinstance(engine, TransferringEngine), "an engine moves KV or lets us do it"
            worker.handover = EngineHandover(engine)
        stack.push_async_callback(worker.handover.close)
        addresses = await worker.rpc.start(process.host, process.unix_socket)
        stack.push_async_callback(worker.rpc.close)
        await events.serve_snapshots(
            process.instance_id, epoch, engine.snapshot, lambda: engine.snapshot("host")
        )
        reports = tasks.create_task(worker.report_forever(), name="load-reports")
        stack.callback(reports.cancel)

        discovery = await stack.enter_async_context(Discovery.from_settings(process.control))
        info = InstanceInfo(
            instance_id=process.instance_id,
            epoch=epoch,
            role=process.role,
            rpc_addresses=addresses,
            kv_address=worker.handover.address,
            model=card,
            num_blocks=engine.spec.num_blocks,
            max_batch_size=engine.spec.max_batch_size,
            pid=os.getpid(),
            host=socket.gethostname(),
            kv_by_engine=isinstance(engine, TransferringEngine) and engine.must_fetch,
        )
        collect_rarely()
        await discovery.register(info, deadline_s=REGISTER_DEADLINE_S)
        registered(process, epoch)
        log.info(
            "ready: %s at %s, KV %s", info.instance_id, addresses, info.kv_address or "by engine"
        )

        await stop.wait()
        log.info("%s drains", process.instance_id)
        # First of all, so that frontends know why the registration goes and keep their connections.
        worker.start_draining()
        await discovery.unregister()
        await worker.drain(process.drain_s)


def main() -> None:
    process = read_settings(sys.argv[1], WorkerSettings)
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        format=f"%(asctime)s {process.instance_id} %(levelname)s %(name)s: %(message)s",
    )
    try:
        uvloop.run(run(process))
    except* OperatorError as group:  # task groups wrap what is raised in them
        for line in dict.fromkeys(map(str, leaves(group))):  # instances tend to fail alike
            log.critical("%s", line)  # `deploy.launch` looks for it
        sys.exit(1)


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """The errors themselves, however deep they are wrapped."""
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from leaves(exc)
        else:
            yield exc


if __name__ == "__main__":
    main()
