"""Instances that answer in memory, and a pipeline over them. Their engines move KV themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import msgspec
from serving.config import DeadlinesConfig, FrontendConfig, RouterConfig
from serving.config.process import ControlServices, FrontendSettings
from serving.errors import InstanceLost
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.kv_router.router import KvRouter
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    EngineTransferParams,
    InstanceInfo,
    ModelCard,
    SamplingParams,
)
from serving.text.preprocess import PreparedRequest

CARD = ModelCard("m", "/nowhere", 512, 16, "salt", "fingerprint", 0)
PROMPT = [11, 12, 13]


def prefilled(request: EngineRequest) -> EngineOutput:
    params = EngineTransferParams("prefill-0", 1, request.request_id, {"opaque_state": b"x"})
    return EngineOutput(request.request_id, [7], "length", kv_transfer_params=params)


class FakeClient:
    """An instance that answers at once, unless `hold` is set; `broken` ones are lost."""

    def __init__(self, instance_id: str) -> None:
        role: Any = instance_id.split("-")[0]
        self.info = InstanceInfo(
            instance_id, 1, role, [], "", CARD, 64, 8, 1, "h", kv_by_engine=True
        )
        self.requests: list[EngineRequest] = []
        self.released: list[str] = []
        self.hold: asyncio.Event | None = None
        self.broken = False
        self.left_early: list[str] = []

    def generate(self, request: EngineRequest) -> FakeStream:
        return FakeStream(self, request)

    def release(self, request_id: str) -> None:
        self.released.append(request_id)


class FakeStream:
    def __init__(self, client: FakeClient, request: EngineRequest) -> None:
        self._client, self._request, self._finished = client, request, False

    async def __aenter__(self) -> Self:
        request = self._request  # as it is when it is sent
        copy = msgspec.structs.replace(request, token_ids=list(request.token_ids))
        self._client.requests.append(copy)
        self._outputs = self._run()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self._client.left_early.append(self._request.request_id)
        await self._outputs.aclose()  # type: ignore[attr-defined]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineOutput:
        return await anext(self._outputs)

    async def _run(self) -> AsyncIterator[EngineOutput]:
        client, request = self._client, self._request
        if client.hold is not None:
            await client.hold.wait()
        if client.broken:
            raise InstanceLost(client.info.instance_id)
        self._finished = True
        if request.phase == "prefill":
            yield prefilled(request)
        else:
            yield EngineOutput(request.request_id, [8], "length")


class FakeInstances:
    def __init__(self, *clients: FakeClient) -> None:
        self.clients = {client.info.instance_id: client for client in clients}
        self.card = CARD

    def client(self, instance_id: str) -> FakeClient:
        return self.clients[instance_id]


def make_pipeline(*clients: FakeClient, router: RouterConfig | None = None) -> Pipeline:
    control = ControlServices(
        namespace="n", etcd_endpoint="", lease_s=10, nats_url="", nats_token_file=""
    )
    process = FrontendSettings(
        topology="disagg",
        disaggregated=True,
        model_name="m",
        frontend=FrontendConfig(),
        router=router or RouterConfig(local_prefill_tokens=0, local_prefill_when_idle=False),
        deadlines=DeadlinesConfig(),
        control=control,
        ready_file="",
    )
    kv_router = KvRouter(process.router, model="m")
    for client in clients:
        kv_router.add_instance(client.info)
    instances: Any = FakeInstances(*clients)
    return Pipeline(process, kv_router, instances, Metrics())


def request(request_id: str = "r", max_tokens: int = 5) -> PreparedRequest:
    return PreparedRequest(request_id, list(PROMPT), SamplingParams(max_tokens=max_tokens))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def collect(pipeline: Pipeline, prepared: PreparedRequest) -> list[int]:
    async with aclosing(pipeline.generate(prepared)) as outputs:
        return [token async for output in outputs for token in output.token_ids]
