"""`python -m serving.frontend FILE`: connect to etcd and NATS, listen, serve, drain.

With `frontend.processes` above one it only starts that many (`group.py`), each with its slot as a
second argument.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from serving.config.process import FrontendSettings, announce_ready, collect_rarely, read_settings
from serving.discovery import Discovery
from serving.errors import OperatorError
from serving.events import EventPlane
from serving.frontend.api.api_keys import ApiKeys, read_keys
from serving.frontend.app import create_app
from serving.frontend.decision_log import DecisionLog
from serving.frontend.instances import Instances
from serving.frontend.log import set_up
from serving.frontend.metrics.registry import Metrics
from serving.frontend.metrics.router import RouterMetrics
from serving.frontend.pipeline import Pipeline
from serving.frontend.process_group import STARTED, ProcessSlot, run_group
from serving.kv_router.router import KvRouter
from serving.rpc.handshake import read_secret

log = logging.getLogger("serving.frontend")


async def run(process: FrontendSettings, slot: ProcessSlot | None) -> None:
    """Serve until SIGTERM or SIGINT; uvicorn handles both and drains."""
    launch_id = os.environ.get("LAUNCH_ID", "")
    token_file = Path(process.control.nats_token_file)
    metrics = Metrics()
    router = KvRouter(process.router, model=process.model_name, rng=random.Random())
    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(process.control.nats_url, process.control.namespace, token_file)
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        instances = Instances(
            router,
            events,
            tasks,
            metrics,
            secret=read_secret(process.control.rpc_secret_file),
            tokenizer_dir=process.engine_dir,
        )
        events.on_reconnect = instances.on_reconnect
        await events.subscribe(instances.on_kv, instances.on_load)
        if slot is not None:
            router.peers = DecisionLog(slot.decision_log, slot.number, len(slot.own_ports))
        metrics.add(RouterMetrics(router, events.counters))
        discovery = await stack.enter_async_context(Discovery.of(process.control))
        owned = [
            tasks.create_task(instances.synchronise_forever(), name="synchronise"),
            tasks.create_task(discovery.watch(instances.up, instances.down), name="watch"),
        ]
        pipeline = Pipeline(process, router, instances, metrics)
        stack.push_async_callback(pipeline.close)
        app = create_app(
            pipeline,
            config=process.frontend,
            metrics=metrics,
            model_name=process.model_name,
            launch_id=launch_id,
            slot=slot,
        )
        served: ASGIApp = app
        if process.frontend.api_keys_file is not None:
            keys = read_keys(process.frontend.api_keys_file)
            served = ApiKeys(app, keys, process.frontend.requests_per_minute)
        server = uvicorn.Server(
            uvicorn.Config(
                served,
                host=process.frontend.host,
                port=process.frontend.port,
                http="httptools",
                ws="none",
                access_log=False,
                log_config=None,
                ssl_certfile=process.frontend.tls_cert_file,
                ssl_keyfile=process.frontend.tls_key_file,
                server_header=False,
                proxy_headers=False,  # nobody asks who the client is
                timeout_graceful_shutdown=max(1, round(process.frontend.drain_s)),
            )
        )
        for signum in (signal.SIGTERM, signal.SIGINT):
            # uvicorn raises what it handled once more, for whoever was there before it.
            signal.signal(signum, lambda *_: None)
        sockets = None if slot is None else slot.sockets()
        serving = asyncio.create_task(server.serve(sockets), name="http")
        # uvicorn offers a flag and no event.
        while not server.started and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if server.started:
            collect_rarely()
            if slot is None:
                announce_ready(process.ready_file, port=process.frontend.port)
            else:
                os.write(sys.stdout.fileno(), STARTED)
            log.info("listening on %s:%d", process.frontend.host, process.frontend.port)
        await serving
        for task in owned:
            task.cancel()
        instances.close()
    log.info("stopped")


def main() -> None:
    process = read_settings(sys.argv[1], FrontendSettings)
    slot = msgspec.json.decode(sys.argv[2], type=ProcessSlot) if len(sys.argv) > 2 else None
    name = "frontend" if slot is None else f"frontend-{slot.number}"
    set_up(name)
    try:
        if slot is not None:
            slot.end_with_parent()
            uvloop.run(run(process, slot))
        elif process.frontend.processes > 1:
            uvloop.run(run_group(process, sys.argv[1]))
        else:
            uvloop.run(run(process, None))
    except* OperatorError as group:  # a task group wraps what is raised in it
        for exc in group.exceptions:
            log.critical("%s", exc)  # `deploy.launch` looks for it
        sys.exit(1)


if __name__ == "__main__":
    main()
