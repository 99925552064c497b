"""Engines that move KV themselves: no prefill without its decode, no pair that is cold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
from serving.config import DeadlinesConfig, FrontendConfig, RouterConfig
from serving.config.process import ControlServices, FrontendSettings
from serving.errors import InstanceLost
from serving.frontend.engine_transfer import EngineTransfers, warm_up
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


async def test_state_of_the_engine_reaches_the_decode_instance() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    assert await collect(make_pipeline(prefill, decode), request()) == [7, 8]
    [asked] = decode.requests
    assert asked.token_ids == [*PROMPT, 7]
    assert isinstance(asked.kv_transfer_params, EngineTransferParams)
    assert asked.kv_transfer_params.state == {"opaque_state": b"x"}
    assert prefill.released == [], "there is nothing that it could release"


async def test_caller_who_leaves_during_the_prefill_leaves_its_kv_fetched() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    prefill.hold = asyncio.Event()
    pipeline = make_pipeline(prefill, decode)
    caller = asyncio.create_task(collect(pipeline, request()))
    await settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert prefill.left_early == [], "an abort may come after the engine committed"
    prefill.hold.set()
    await settle()
    [asked] = decode.requests
    assert asked.phase == "decode"
    assert asked.token_ids == [*PROMPT, 7]
    assert asked.sampling.max_tokens == 2, "one token, to have it fetch"


async def test_caller_who_leaves_after_the_first_token_leaves_its_kv_fetched() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    pipeline = make_pipeline(prefill, decode)
    outputs = pipeline.generate(request())
    first = await anext(outputs)
    assert first.token_ids == [7]
    await outputs.aclose()
    await settle()
    [asked] = decode.requests
    assert asked.token_ids == [*PROMPT, 7]


async def test_decode_that_was_asked_is_not_asked_again() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    decode.hold = asyncio.Event()
    pipeline = make_pipeline(prefill, decode)
    caller = asyncio.create_task(collect(pipeline, request()))
    await settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await settle()
    assert len(decode.requests) == 1
    assert decode.left_early == ["r"], "it is told, and aborts when it has fetched"


async def test_failed_prefill_of_a_caller_who_left_concerns_nobody() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    prefill.hold, prefill.broken = asyncio.Event(), True
    pipeline = make_pipeline(prefill, decode)
    caller = asyncio.create_task(collect(pipeline, request()))
    await settle()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    prefill.hold.set()
    await settle()
    assert decode.requests == []


async def test_without_a_decode_instance_the_engines_timeout_is_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def nobody() -> Any:
        raise InstanceLost("decode-0")

    handovers = EngineTransfers(nobody)
    prompt = EngineRequest("r", PROMPT, len(PROMPT), SamplingParams(max_tokens=5), "prefill")
    handovers.abandon(prompt, prefilled(prompt))
    await settle()
    assert "its KV stays with the prefill engine" in caplog.text


async def test_close_ends_what_goes_on() -> None:
    decode = FakeClient("decode-0")
    decode.hold = asyncio.Event()
    client: Any = decode
    handovers = EngineTransfers(lambda: client)
    prompt = EngineRequest("r", PROMPT, len(PROMPT), SamplingParams(max_tokens=5), "prefill")
    handovers.abandon(prompt, prefilled(prompt))
    await settle()
    await handovers.close()
    assert decode.left_early == ["r"]


@pytest.mark.parametrize("newcomer", ["prefill", "decode"])
async def test_warm_up_takes_every_pair_from_prefill_to_decode(newcomer: str) -> None:
    peer_role = {"prefill": "decode", "decode": "prefill"}[newcomer]
    new: Any = FakeClient(f"{newcomer}-9")
    peers: list[Any] = [FakeClient(f"{peer_role}-{index}") for index in range(2)]
    await warm_up(new, peers)
    by_role = {newcomer: [new], peer_role: peers}
    prefills = [r for client in by_role["prefill"] for r in client.requests]
    decodes = [r for client in by_role["decode"] for r in client.requests]
    assert [r.phase for r in prefills] == ["prefill"] * 2
    assert [r.phase for r in decodes] == ["decode"] * 2
    assert all(r.kv_transfer_params is not None for r in decodes)
    assert len({r.request_id for r in prefills}) == 2


async def test_pair_that_stays_cold_is_told_and_keeps_out_only_who_has_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    new: Any = FakeClient("decode-0")
    good: Any = FakeClient("prefill-0")
    bad: Any = FakeClient("prefill-1")
    bad.broken = True
    await warm_up(new, [good, bad])
    assert "no KV from prefill-1 to decode-0" in caplog.text
    with pytest.raises(InstanceLost, match="no KV moves"):
        await warm_up(new, [bad])
