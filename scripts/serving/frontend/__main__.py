"""`python -m serving.frontend FILE`: connect to both planes, listen, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import uvicorn
import uvloop
from starlette.types import ASGIApp

from serving.discovery import Discovery
from serving.errors import OperatorError
from serving.events import EventPlane
from serving.frontend.api_keys import ApiKeys, read_keys
from serving.frontend.app import create_app
from serving.frontend.instances import Instances
from serving.frontend.metrics import Metrics
from serving.frontend.pipeline import Pipeline
from serving.frontend.router_metrics import RouterMetrics
from serving.frontend.sharing import Sharing
from serving.kv_router.router import KvRouter
from serving.process_config import FrontendProcess, announce_ready, read
from serving.rpc.handshake import read_secret

log = logging.getLogger("serving.frontend")


async def run(process: FrontendProcess) -> None:
    """Serve until SIGTERM or SIGINT; uvicorn handles both and drains."""
    launch_id = os.environ.get("LAUNCH_ID", "")
    token_file = Path(process.planes.nats_token_file)
    metrics = Metrics()
    router = KvRouter(process.router, model=process.model_name, rng=random.Random())
    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(process.planes.nats_url, process.planes.namespace, token_file)
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        instances = Instances(
            router, events, tasks, metrics, secret=read_secret(process.planes.rpc_secret_file)
        )
        events.on_reconnect = instances.on_reconnect
        await events.subscribe(instances.on_kv, instances.on_load)
        sharing = Sharing(router, events)
        await events.subscribe_routed(sharing.on_batch)
        metrics.add(RouterMetrics(router, events.counters, sharing))
        discovery = await stack.enter_async_context(
            Discovery.connect(
                process.planes.etcd_endpoint,
                process.planes.namespace,
                lease_s=process.planes.lease_s,
            )
        )
        owned = [
            tasks.create_task(instances.synchronise_forever(), name="synchronise"),
            tasks.create_task(discovery.watch(instances.up, instances.down), name="watch"),
            tasks.create_task(sharing.stay_in_touch(), name="sharing"),
        ]
        pipeline = Pipeline(process, router, instances, metrics)
        stack.push_async_callback(pipeline.close)
        app = create_app(
            pipeline,
            config=process.frontend,
            metrics=metrics,
            model_name=process.model_name,
            launch_id=launch_id,
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
                server_header=False,
                timeout_graceful_shutdown=max(1, round(process.frontend.drain_s)),
            )
        )
        for signum in (signal.SIGTERM, signal.SIGINT):
            # uvicorn raises what it handled once more, for whoever was there before it.
            signal.signal(signum, lambda *_: None)
        serving = asyncio.create_task(server.serve(), name="http")
        # uvicorn offers a flag and no event.
        while not server.started and not serving.done():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if server.started:
            announce_ready(process.ready_file, port=process.frontend.port)
            log.info("listening on http://%s:%d", process.frontend.host, process.frontend.port)
        await serving
        for task in owned:
            task.cancel()
        instances.close()
    log.info("stopped")


def main() -> None:
    process = read(sys.argv[1], FrontendProcess)
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        format="%(asctime)s frontend %(levelname)s %(name)s: %(message)s",
    )
    try:
        uvloop.run(run(process))
    except* OperatorError as group:  # a task group wraps what is raised in it
        for exc in group.exceptions:
            log.critical("%s", exc)  # `deploy.launch` looks for it
        sys.exit(1)


if __name__ == "__main__":
    main()
