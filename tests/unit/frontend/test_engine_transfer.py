"""Engines that move KV themselves: no prefill without its decode, no pair that is cold."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving.errors import InstanceLost
from serving.frontend.engine_transfer import EngineTransfers, warm_up
from serving.protocol import (
    EngineRequest,
    EngineTransferParams,
    SamplingParams,
)
from unit.frontend.fake_instances import (
    PROMPT,
    FakeClient,
    collect,
    make_pipeline,
    prefilled,
    request,
    settle,
)


async def test_opaque_engine_state_reaches_the_decode_instance() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    assert await collect(make_pipeline(prefill, decode), request()) == [7, 8]
    [asked] = decode.requests
    assert asked.token_ids == [*PROMPT, 7]
    assert isinstance(asked.kv_transfer_params, EngineTransferParams)
    assert asked.kv_transfer_params.state == {"opaque_state": b"x"}
    assert prefill.released == [], "there is nothing that it could release"


async def test_kv_is_fetched_when_the_caller_leaves_during_the_prefill() -> None:
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


async def test_kv_is_fetched_when_the_caller_leaves_after_the_first_token() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    pipeline = make_pipeline(prefill, decode)
    outputs = pipeline.generate(request())
    first = await anext(outputs)
    assert first.token_ids == [7]
    await outputs.aclose()
    await settle()
    [asked] = decode.requests
    assert asked.token_ids == [*PROMPT, 7]


async def test_decode_that_has_started_is_not_started_again() -> None:
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
    assert decode.left_early == ["r"], "it gets an abort, which takes effect after the fetch"


async def test_failed_prefill_of_a_caller_that_left_starts_no_decode() -> None:
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


async def test_kv_that_no_decode_instance_can_fetch_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def nobody() -> Any:
        raise InstanceLost("decode-0")

    handovers = EngineTransfers(nobody)
    prompt = EngineRequest("r", PROMPT, len(PROMPT), SamplingParams(max_tokens=5), "prefill")
    handovers.abandon(prompt, prefilled(prompt))
    await settle()
    assert "its KV stays with the prefill engine" in caplog.text


async def test_close_ends_running_fetches() -> None:
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


async def test_failed_warm_up_is_logged_and_excludes_an_instance_without_another_pair(
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
