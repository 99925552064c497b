"""A prompt with little left to compute is not sent through two instances."""

from serving.config import RouterConfig
from serving.protocol import SamplingParams
from serving.text.preprocess import PreparedRequest
from unit.frontend.fake_instances import FakeClient, collect, make_pipeline


def prepared(num_tokens: int) -> PreparedRequest:
    return PreparedRequest("r", list(range(num_tokens)), SamplingParams(max_tokens=5))


async def test_short_prompt_is_prefilled_where_it_is_decoded() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    pipeline = make_pipeline(prefill, decode, router=RouterConfig())
    assert await collect(pipeline, prepared(5)) == [8]
    assert [asked.phase for asked in decode.requests] == ["agg"]
    assert prefill.requests == []


async def test_long_prompt_goes_through_a_prefill_instance() -> None:
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    pipeline = make_pipeline(prefill, decode, router=RouterConfig())
    assert await collect(pipeline, prepared(100)) == [7, 8]
    assert [asked.phase for asked in prefill.requests] == ["prefill"]
    assert [asked.phase for asked in decode.requests] == ["decode"]


async def test_local_prefill_moves_on_when_its_decode_instance_is_lost() -> None:
    prefill = FakeClient("prefill-0")
    decodes = [FakeClient("decode-0"), FakeClient("decode-1")]
    pipeline = make_pipeline(prefill, *decodes, router=RouterConfig())
    for client in decodes:
        client.broken = True
        break
    for _ in range(8):
        assert await collect(pipeline, prepared(5)) == [8]
    assert decodes[1].requests


async def test_each_attempt_has_its_own_id() -> None:
    """A late output of an abandoned attempt must not end the next one."""
    prefill, decode = FakeClient("prefill-0"), FakeClient("decode-0")
    prefill.broken = True
    pipeline = make_pipeline(prefill, decode, router=RouterConfig())
    assert await collect(pipeline, prepared(100)) == [8]
    assert [asked.request_id for asked in (*prefill.requests, *decode.requests)] == ["r", "r~2"]
