"""Workers that answer over real RPC what their script says, and a frontend's pipeline over them.

Only etcd and NATS are missing: tests register workers themselves, and there are no events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from serving.config import DeadlinesConfig, FrontendConfig, RouterConfig
from serving.config.process import ControlServices, FrontendSettings
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.kv_router.router import KvRouter
from serving.protocol import EngineOutput, EngineRequest, ErrorInfo, InstanceInfo, Role
from serving.rpc import RpcServer
from unit.frontend.fake_instances import CARD, collect, request
from waiting import until

Script = list[tuple[float, EngineOutput]]


def token(value: int, **fields: Any) -> EngineOutput:
    return EngineOutput("r", [value], **fields)


def error(kind: str) -> EngineOutput:
    return EngineOutput("r", [], "error", error=ErrorInfo(kind, "why"))


class ScriptedWorker:
    """Sends the outputs of its script, each so many seconds after the request, and then nothing."""

    def __init__(
        self, *script: tuple[float, EngineOutput], name: str = "agg-0", epoch: int = 1
    ) -> None:
        self.name, self.epoch, self.script = name, epoch, script
        self.requests: list[EngineRequest] = []
        self.released: list[str] = []
        self.aborted = asyncio.Event()
        self.server = RpcServer(self, name, epoch)

    async def start(self, folder: Path) -> InstanceInfo:
        addresses = await self.server.start("127.0.0.1", str(folder / f"{self.name}.sock"))
        role: Any = self.name.split("-")[0]
        return InstanceInfo(self.name, self.epoch, role, addresses, "", CARD, 64, 8, 1, "h")

    def send(self, output: EngineOutput, request: EngineRequest) -> None:
        self.server.send([msgspec.structs.replace(output, request_id=request.request_id)])

    def on_generate(self, request: EngineRequest) -> None:
        self.requests.append(request)
        for after_s, output in self.script:
            asyncio.get_running_loop().call_later(after_s, self.send, output, request)

    def on_abort(self, request_id: str) -> None:
        assert request_id.partition("~")[0] == "r"
        self.aborted.set()

    def on_release(self, request_id: str) -> None:
        self.released.append(request_id)


class ConnectedPipeline:
    """A pipeline with real connections to workers, which get requests in turn."""

    def __init__(
        self, tasks: asyncio.TaskGroup, *, disaggregated: bool, deadlines: DeadlinesConfig
    ) -> None:
        self.metrics = Metrics()
        settings = FrontendSettings(
            topology="any",
            disaggregated=disaggregated,
            model_name="m",
            frontend=FrontendConfig(),
            router=RouterConfig(policy="round_robin", local_prefill_tokens=0),
            deadlines=deadlines,
            control=ControlServices(
                namespace="n", etcd_endpoint="", lease_s=10, nats_url="", nats_token_file=""
            ),
            ready_file="",
        )
        self.router = KvRouter(settings.router, model="m")
        no_events: Any = None  # this policy needs no snapshots
        self.instances = Instances(self.router, no_events, tasks, self.metrics)
        self.pipeline = Pipeline(settings, self.router, self.instances, self.metrics)

    def routable(self, role: Role = "agg") -> list[str]:
        return [info.instance_id for info in self.router.instances(role)]

    async def add(self, info: InstanceInfo) -> None:
        self.instances.up(info)
        await until(lambda: info.instance_id in self.routable(info.role))

    async def answer(self) -> list[int]:
        async with asyncio.timeout(5):
            return await collect(self.pipeline, request())

    def num_expired(self, phase: str) -> int:
        page = self.metrics.render().decode()
        head = f'serving_deadlines_exceeded_total{{phase="{phase}"}} '
        [line] = [line for line in page.splitlines() if line.startswith(head)]
        return int(float(line.removeprefix(head)))

    def distrusted(self) -> list[str]:
        """Instances that the router avoids because they failed."""
        return [
            state.info.instance_id for state in self.router.state() if state.breaker != "closed"
        ]


@asynccontextmanager
async def pipeline_over(
    folder: Path, *workers: ScriptedWorker, **deadlines: float
) -> AsyncIterator[ConnectedPipeline]:
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        connected = ConnectedPipeline(
            tasks,
            disaggregated=any(worker.name == "decode-0" for worker in workers),
            deadlines=msgspec.structs.replace(DeadlinesConfig(), **deadlines),
        )
        stack.callback(connected.instances.close)
        for worker in workers:
            info = await worker.start(folder)
            stack.push_async_callback(worker.server.close)
            await connected.add(info)
        yield connected
