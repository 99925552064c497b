"""Workers that say nothing: how long the pipeline waits for each phase, and what it then says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serving.config import DeadlinesConfig, FrontendConfig, RouterConfig
from serving.errors import DeadlineExceeded, InstanceLost
from serving.frontend.metrics import Metrics
from serving.frontend.pipeline import Pipeline
from serving.kv_router.router import KvRouter
from serving.process_config import FrontendProcess, Planes
from serving.protocol import EngineOutput, EngineRequest, InstanceInfo
from serving.rpc import RpcClient, RpcServer
from unit.frontend.test_engine_handover import CARD, collect, request


class Worker:
    """Sends the first `num_outputs` tokens of a request, `gap_s` apart, and then nothing."""

    def __init__(self) -> None:
        self.num_outputs, self.gap_s = 0, 0.0
        self.aborted = asyncio.Event()
        self.server: RpcServer

    def on_generate(self, asked: EngineRequest) -> None:
        loop = asyncio.get_running_loop()
        for number in range(self.num_outputs):
            output = EngineOutput(asked.request_id, [number])
            loop.call_later(number * self.gap_s, self.server.send, [output])

    def on_abort(self, request_id: str) -> None:
        assert request_id == "r"
        self.aborted.set()

    def on_release(self, request_id: str) -> None:
        raise AssertionError("nothing is held")


@asynccontextmanager
async def pipeline_to(worker: Worker, path: Path, **deadlines: float) -> AsyncIterator[Pipeline]:
    worker.server = RpcServer(worker, "agg-0", 1)
    addresses = await worker.server.start("127.0.0.1", str(path / "w.sock"))
    info = InstanceInfo("agg-0", 1, "agg", addresses, "", CARD, 64, 8, 1, "h")
    client = RpcClient(info, merge=True)
    await client.connect()
    process = FrontendProcess(
        topology="agg",
        disaggregated=False,
        model_name="m",
        frontend=FrontendConfig(),
        router=RouterConfig(),
        deadlines=msgspec.structs.replace(DeadlinesConfig(), **deadlines),
        planes=Planes(namespace="n", etcd_endpoint="", lease_s=10, nats_url="", nats_token_file=""),
        ready_file="",
    )
    router = KvRouter(process.router, model="m")
    router.add_instance(info)

    class One:
        card = CARD

        def client(self, instance_id: str) -> RpcClient:
            return client

    instances: Any = One()
    try:
        yield Pipeline(process, router, instances, Metrics())
    finally:
        await client.close()
        await worker.server.close()


@pytest.mark.parametrize(
    ("num_outputs", "deadlines", "error", "words"),
    [
        (0, {"prefill_s": 0.1}, DeadlineExceeded, "prefill ran past its deadline of 0.1 s"),
        (2, {"token_s": 0.1}, InstanceLost, "silent for 0.1 s"),
        (2, {"total_s": 0.2}, DeadlineExceeded, "total ran past its deadline of 0.2 s"),
    ],
)
async def test_silence_is_ended_by_its_deadline(
    tmp_path: Path, num_outputs: int, deadlines: Any, error: Any, words: str
) -> None:
    worker = Worker()
    worker.num_outputs, worker.gap_s = num_outputs, 0.02
    async with pipeline_to(worker, tmp_path, **deadlines) as pipeline:
        async with asyncio.timeout(1):
            with pytest.raises(error, match=words):
                await collect(pipeline, request())
        await asyncio.wait_for(worker.aborted.wait(), 1)
