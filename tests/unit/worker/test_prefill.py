"""Which prefills are offered, when, to whom, and that every offer ends."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from serving.kv_layout import KvLayout
from serving.kv_transfer import PrefillProgress
from serving.protocol import EngineOutput, EngineRequest, Guide, KvTransferParams, SamplingParams
from serving.worker.prefill import PrefillEndpoint
from waiting import until

LAYOUT = KvLayout.uniform(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")
REQUEST = EngineRequest("a", list(range(18)), 18, SamplingParams(max_tokens=4), phase="prefill")
FURTHER = EngineOutput("a", [])
FINISHED = EngineOutput("a", [9], "length")


class FakeEngine:
    """Says how far the one request is."""

    def __init__(self) -> None:
        self.num_computed = 0
        self.released: list[str] = []
        self.kv = self.spec = self
        self.kv_layout, self.max_model_len = LAYOUT, 64

    def submit(self, request: EngineRequest) -> None: ...

    def computed(self, request_id: str) -> int:
        return self.num_computed

    def release(self, request_id: str) -> None:
        self.released.append(request_id)


def make(request: EngineRequest = REQUEST, **options: Any) -> tuple[PrefillEndpoint, FakeEngine]:
    engine: Any = FakeEngine()
    settings = {"instance_id": "p", "epoch": 1, "hold_s": 30.0, "overlap": True}
    endpoint = PrefillEndpoint(engine, address=lambda: "tcp://x:1", **{**settings, **options})
    endpoint.submit(request)
    return endpoint, engine


def params_of(output: EngineOutput | None) -> KvTransferParams:
    assert output is not None
    assert isinstance(output.kv_transfer_params, KvTransferParams)
    return output.kv_transfer_params


async def test_an_early_offer_is_sent_once_and_equals_the_final_one() -> None:
    endpoint, engine = make()
    early = endpoint.on_output(FURTHER)
    assert early is not None
    assert (early.token_ids, early.finish_reason) == ([], None)
    assert endpoint.on_output(FURTHER) is None
    last = endpoint.on_output(FINISHED)
    assert params_of(last) == params_of(early)
    assert params_of(early).num_blocks == 5
    assert endpoint.num_held == 1
    endpoint.done("a")
    assert endpoint.num_held == 0
    assert engine.released == ["a"]


@pytest.mark.parametrize(
    ("sampling", "overlap"),
    [
        (SamplingParams(max_tokens=4), False),
        (SamplingParams(max_tokens=1), True),
        (SamplingParams(max_tokens=4, guide=Guide("regex", "a+")), True),
    ],
    ids=["switched-off", "nothing-follows", "guided"],
)
async def test_some_prefills_are_not_offered_early(sampling: SamplingParams, overlap: bool) -> None:
    request = msgspec.structs.replace(REQUEST, sampling=sampling)
    endpoint, _ = make(request, overlap=overlap)
    assert endpoint.on_output(FURTHER) is None
    assert endpoint.num_held == 0


async def test_progress_comes_with_the_blocks_and_the_token_with_the_end() -> None:
    endpoint, engine = make()
    nonce = params_of(endpoint.on_output(FURTHER)).nonce
    waiting = asyncio.create_task(endpoint.progress("a", nonce, 0))
    await asyncio.sleep(0)
    endpoint.on_output(FURTHER)
    await asyncio.sleep(0)
    assert not waiting.done(), "nothing was computed"
    engine.num_computed = 2
    endpoint.on_output(FURTHER)
    assert await waiting == PrefillProgress(2)
    assert await endpoint.progress("a", nonce, 1) == PrefillProgress(2)
    engine.num_computed = 0  # preempted
    waiting = asyncio.create_task(endpoint.progress("a", nonce, 2))
    await asyncio.sleep(0)
    endpoint.on_output(FINISHED)
    assert await waiting == PrefillProgress(5, 9)
    with pytest.raises(PermissionError):
        await endpoint.progress("a", "guess", 0)
    endpoint.done("a")


@pytest.mark.parametrize("reason", ["stop", "error", "cancelled", "abort"])
async def test_an_early_decode_gets_an_error_when_its_prefill_ends_without_kv(reason: Any) -> None:
    endpoint, engine = make()
    nonce = params_of(endpoint.on_output(FURTHER)).nonce
    waiting = asyncio.create_task(endpoint.progress("a", nonce, 0))
    await asyncio.sleep(0)
    if reason == "abort":
        endpoint.abort("a")
    else:
        ended = endpoint.on_output(EngineOutput("a", [], reason))
        assert ended is not None
        assert ended.kv_transfer_params is None
    with pytest.raises(KeyError):
        await waiting
    assert endpoint.num_held == 0
    assert engine.released == ["a"]


async def test_an_unfetched_offer_expires_after_its_prefill_but_not_during_it() -> None:
    endpoint, engine = make(hold_s=0.05)
    endpoint.on_output(FURTHER)
    await asyncio.sleep(0.1)
    assert endpoint.num_held == 1
    endpoint.on_output(FINISHED)
    await until(lambda: not endpoint.num_held)
    assert endpoint.num_expired == 1
    assert engine.released == ["a"]
