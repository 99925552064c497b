"""A prefill and a decode worker with tiny models, and a frontend's pipeline before them.

Real engines, RPC and KV transfer (over TCP) in one process; only etcd and NATS are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from serving.config import (
    DeadlinesConfig,
    EngineConfig,
    FrontendConfig,
    KvTransferConfig,
    RouterConfig,
)
from serving.config.process import ControlServices, FrontendSettings, WorkerSettings
from serving.engine.torch.engine import TorchEngine
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.kv_router.router import KvRouter
from serving.load_report import LoadReport
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    InstanceInfo,
    KvEvent,
    ModelCard,
    Role,
    SamplingParams,
)
from serving.rpc import RpcClient
from serving.text.preprocess import PreparedRequest
from serving.worker.block_handover import BlockHandover
from serving.worker.worker import Worker
from unit.engine.torch_rig import make_engine, settled

CARD = ModelCard("m", "/nowhere", 512, 8, "tiny", "tiny", 0)
CONTROL = ControlServices(
    namespace="n", etcd_endpoint="", lease_s=10, nats_url="", nats_token_file=""
)


class Silent:
    """An event plane that nobody listens to."""

    def publish_kv(self, events: list[KvEvent], load: Any = None) -> None: ...

    def publish_load(self, report: Any) -> None: ...


class RunningWorker:
    """One worker as `serving.worker` builds it, and a client connected to it."""

    engine: TorchEngine
    worker: Worker
    client: RpcClient

    def __init__(self) -> None:
        self.told: list[EngineOutput] = []  # by the engine, before the worker made anything of it
        self.asked: list[EngineRequest] = []

    @property
    def handover(self) -> BlockHandover:
        assert isinstance(self.worker.handover, BlockHandover)
        return self.worker.handover

    @property
    def pulled(self) -> int:
        return self.handover.transfers.kv_bytes_received


SIZES: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 16}


@asynccontextmanager
async def running_worker(
    role: Role, folder: Path, kv_transfer: KvTransferConfig, sockets: str, **options: Any
) -> AsyncIterator[RunningWorker]:
    """`sockets` is a folder with a short name."""
    instance_id = f"{role}-0"
    process = WorkerSettings(
        instance_id=instance_id,
        role=role,
        model_name="m",
        engine_dir=str(folder),
        engine_fingerprint="tiny",
        engine=EngineConfig(),
        device="cpu",
        dtype="float32",
        gpus=[],
        host="127.0.0.1",
        kv_host="127.0.0.1",
        unix_socket=f"{sockets}/{role}",
        ready_file="",
        control=CONTROL,
        kv_transfer=kv_transfer,
        drain_s=1.0,
    )
    this = RunningWorker()
    this.engine = make_engine(folder, **{**SIZES, **options})

    def sink(outputs: list[EngineOutput], cache: list[KvEvent], load: LoadReport) -> None:
        this.told += outputs
        this.worker.on_step(outputs, cache, load)

    silent: Any = Silent()

    class Remembering(Worker):
        def on_generate(self, request: EngineRequest) -> None:
            this.asked.append(request)
            super().on_generate(request)

    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        await this.engine.start(sink)
        stack.push_async_callback(this.engine.close)
        this.worker = Remembering(process, 1, this.engine, silent, tasks)
        addresses = await stack.enter_async_context(this.worker.listening())
        info = InstanceInfo(
            instance_id, 1, role, addresses, this.handover.address, CARD, 64, 8, 1, "h"
        )
        this.client = RpcClient(info)
        await this.client.connect()
        stack.push_async_callback(this.client.close)
        yield this


class Pair:
    """Both workers and the pipeline. `answer` is what a client would get."""

    def __init__(
        self, prefill: RunningWorker, decode: RunningWorker, deadlines: DeadlinesConfig
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.card = CARD
        process = FrontendSettings(
            topology="disagg",
            disaggregated=True,
            model_name="m",
            frontend=FrontendConfig(),
            router=RouterConfig(),
            deadlines=deadlines,
            control=CONTROL,
            ready_file="",
        )
        router = KvRouter(process.router, model="m")
        for worker in (prefill, decode):
            router.add_instance(worker.client.info)
        instances: Any = self
        self.pipeline = Pipeline(process, router, instances, Metrics())

    def client(self, instance_id: str) -> RpcClient:
        return {"prefill-0": self.prefill, "decode-0": self.decode}[instance_id].client

    async def answer(self, name: str, prompt: list[int], sampling: SamplingParams) -> list[int]:
        prepared = PreparedRequest(name, list(prompt), sampling)
        async with aclosing(self.pipeline.generate(prepared)) as outputs:
            return [token async for output in outputs for token in output.token_ids]

    async def check_nothing_is_left(self) -> None:
        """Neither blocks, nor offers, nor fetches, nor requests."""
        for worker in (self.prefill, self.decode):
            await settled(worker.engine)
            worker.engine.check_integrity()
            assert worker.handover.num_held == 0
            assert worker.worker.rpc.num_live == 0
        assert self.decode.handover.num_fetching == 0


@asynccontextmanager
async def running_pair(
    folder: Path,
    *,
    decode: dict[str, Any] | None = None,
    deadlines: DeadlinesConfig | None = None,
    **options: Any,
) -> AsyncIterator[Pair]:
    """`options` are those of the prefill engine, or of `kv_transfer`."""
    names = ("overlap", "transfer_s", "hold_s", "chunk_bytes")
    chosen: Any = {key: options.pop(key) for key in names if key in options}
    settings = KvTransferConfig(transport="tcp", **chosen)
    with TemporaryDirectory() as sockets:
        async with (
            running_worker("prefill", folder, settings, sockets, **options) as source,
            running_worker("decode", folder, settings, sockets, **(decode or {})) as target,
        ):
            pair = Pair(source, target, deadlines or DeadlinesConfig())
            yield pair
            await pair.check_nothing_is_left()
