"""`python -m serving.worker FILE`: build the parts, register, serve, drain.

Order matters: an instance is registered last, when it can serve, and unregistered first, before
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
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from serving.discovery import Discovery
from serving.engine.base import BlockEngine, EngineLoad
from serving.errors import OperatorError
from serving.events import EventPlane
from serving.kv_transfer import make_transfer
from serving.process_config import WorkerProcess, announce_ready, read
from serving.protocol import EngineOutput, InstanceInfo, KvEvent, ModelCard
from serving.worker.worker import Worker

log = logging.getLogger("serving.worker")

REGISTER_DEADLINE_S = 60.0


def load_engine(process: WorkerProcess) -> tuple[BlockEngine, ModelCard]:
    """The engine (not started) and the card that frontends serve the model by."""
    from serving.engine.manifest import check_max_model_len, load_manifest
    from serving.engine.torch.engine import TorchEngine

    manifest = load_manifest(Path(process.engine_dir))
    if manifest.fingerprint != process.engine_fingerprint:
        raise OperatorError(
            f"{process.engine_dir} was built as {manifest.fingerprint}, "
            f"not {process.engine_fingerprint}",
            remedy="run the serve target again: it rebuilds the engine",
        )
    config = process.engine
    check_max_model_len(config.max_model_len, manifest.model_max_len, manifest.model_id)
    engine = TorchEngine(
        Path(process.engine_dir),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        kv_cache_tokens=config.kv_cache_tokens,
        max_batch_size=config.max_batch_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        device=process.device,
        dtype=process.dtype,
        num_threads=config.num_threads,
        hash_salt=manifest.hash_salt,
        fingerprint=manifest.fingerprint,
    )
    card = ModelCard(
        name=process.model_name,
        tokenizer_dir=str(Path(process.engine_dir).resolve()),
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        hash_salt=manifest.hash_salt,
        engine_fingerprint=manifest.fingerprint,
        created=int(manifest.created),
    )
    return engine, card


async def run(process: WorkerProcess) -> None:
    """Serve until SIGTERM or SIGINT; then drain and leave nothing behind."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    epoch = time.time_ns()
    engine, card = load_engine(process)
    token_file = Path(process.planes.nats_token_file)

    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(
            EventPlane.connect(process.planes.nats_url, process.planes.namespace, token_file)
        )
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        worker: Worker | None = None

        def sink(outputs: list[EngineOutput], cache: list[KvEvent], load: EngineLoad) -> None:
            if worker is not None:  # steps of the warm-up concern nobody
                worker.on_step(outputs, cache, load)

        log.info("loading %s", process.engine_dir)
        await engine.start(sink)
        stack.push_async_callback(engine.close)
        layout = engine.spec.kv_layout
        assert layout is not None, "a block engine has a layout"
        transfer = make_transfer(
            process.kv_transfer.transport,
            layout,
            host=process.host,
            chunk_bytes=process.kv_transfer.chunk_bytes,
            connect_s=process.kv_transfer.connect_s,
            transfer_s=process.kv_transfer.transfer_s,
        )
        worker = Worker(process, epoch, engine, transfer, events, tasks)
        await transfer.serve(worker.prefill)
        stack.push_async_callback(transfer.close)
        addresses = await worker.rpc.start(process.host, process.unix_socket)
        stack.push_async_callback(worker.rpc.close)
        stack.callback(worker.decode.close)
        await events.serve_snapshots(process.instance_id, epoch, engine.snapshot)
        reports = tasks.create_task(worker.report_forever(), name="load-reports")
        stack.callback(reports.cancel)

        discovery = await stack.enter_async_context(
            Discovery.connect(
                process.planes.etcd_endpoint,
                process.planes.namespace,
                lease_s=process.planes.lease_s,
            )
        )
        info = InstanceInfo(
            instance_id=process.instance_id,
            epoch=epoch,
            role=process.role,
            rpc_addresses=addresses,
            kv_address=transfer.address,
            model=card,
            num_blocks=engine.spec.num_blocks,
            max_batch_size=engine.spec.max_batch_size,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        await discovery.register(info, deadline_s=REGISTER_DEADLINE_S)
        announce_ready(process.ready_file, instance_id=process.instance_id, epoch=epoch)
        log.info("ready: %s at %s, KV at %s", info.instance_id, addresses, transfer.address)

        await stop.wait()
        log.info("draining")
        await discovery.unregister()
        await worker.drain(process.drain_s)
    log.info("stopped")


def main() -> None:
    process = read(sys.argv[1], WorkerProcess)
    logging.basicConfig(
        level=os.environ.get("LOG_LEVEL", "INFO"),
        format=f"%(asctime)s {process.instance_id} %(levelname)s %(name)s: %(message)s",
    )
    try:
        uvloop.run(run(process))
    except* OperatorError as group:  # a task group wraps what is raised in it
        for exc in group.exceptions:
            log.error("%s", exc)
        sys.exit(1)


if __name__ == "__main__":
    main()
