"""Samples of one prompt go where its blocks are, as long as that works."""

from __future__ import annotations

import asyncio

import msgspec
from serving.text.preprocess import PreparedRequest, SampleGroup
from unit.frontend.fake_instances import FakeClient, collect, make_pipeline, request


def samples(count: int) -> list[PreparedRequest]:
    sample_group = SampleGroup()
    return [
        msgspec.structs.replace(request(f"r-{i}"), sample_group=sample_group) for i in range(count)
    ]


async def test_samples_of_one_prompt_share_a_prefill_and_a_decode_instance() -> None:
    prefills = [FakeClient(f"prefill-{i}") for i in range(3)]
    decodes = [FakeClient(f"decode-{i}") for i in range(3)]
    pipeline = make_pipeline(*prefills, *decodes)
    answers = await asyncio.gather(*(collect(pipeline, sample) for sample in samples(8)))
    assert answers == [[7, 8]] * 8
    for clients in (prefills, decodes):
        assert sorted(len(client.requests) for client in clients) == [0, 0, 8]


async def test_separate_requests_are_spread_over_instances() -> None:
    prefills = [FakeClient(f"prefill-{i}") for i in range(3)]
    pipeline = make_pipeline(*prefills, FakeClient("decode-0"))
    await asyncio.gather(*(collect(pipeline, request(f"r-{i}")) for i in range(9)))
    assert all(client.requests for client in prefills)


async def test_samples_leave_an_instance_that_is_lost() -> None:
    prefills = [FakeClient(f"prefill-{i}") for i in range(2)]
    pipeline = make_pipeline(*prefills, FakeClient("decode-0"))
    first, *others = samples(4)
    assert await collect(pipeline, first) == [7, 8]
    [home] = [client for client in prefills if client.requests]
    [other] = [client for client in prefills if not client.requests]
    home.broken = True
    answers = await asyncio.gather(*(collect(pipeline, sample) for sample in others))
    assert answers == [[7, 8]] * 3
    assert len(other.requests) == 3
