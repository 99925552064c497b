"""Admission, answers and errors of requests, when the library answers in unusual ways."""

from __future__ import annotations

from typing import Any

import pytest
from serving.engine.trtllm.requests.guided import check_supported
from serving.errors import EngineFailed, InvalidRequest
from serving.protocol import Guide
from unit.engine.torch_rig import greedy, request
from unit.engine.trtllm.requests.fake_library import (
    PROMPT,
    last,
    rig,
)


async def test_calls_are_by_keyword_and_streamed() -> None:
    async with rig() as here:
        here.submit("r")
        result = await here.library.called()
        assert result.call.keys() == {"inputs", "sampling_params", "streaming"}
        assert result.call["inputs"] == PROMPT
        assert result.call["streaming"] is True
        assert here.requests.context.queued_tokens == 4
        result.say(10)
        await here.sink.started("r")
        assert here.requests.context.queued_tokens == 0
        result.say(11, reason="length")
        await here.sink.finished("r")
        assert here.sink.tokens["r"] == [10, 11]


@pytest.mark.parametrize(("says", "expected"), [(True, 3), (False, 4)])
async def test_cached_tokens_come_with_the_first_output_only(says: bool, expected: int) -> None:
    async with rig() as here:
        here.library.tells_cached = says
        here.submit("r")
        result = await here.library.called()
        if says:
            result.cached_tokens = 3
        result.say(10)
        await here.sink.started("r")
        result.say(11, reason="length")
        await here.sink.finished("r")  # the sink refuses to be told twice
        assert here.sink.cached["r"] == expected


async def test_outputs_of_one_loop_turn_are_delivered_in_one_call() -> None:
    async with rig() as here:
        here.submit("a")
        here.submit("b")
        results = [await here.library.called(n) for n in (1, 2)]
        for result in results:
            result.say(10)
        await here.sink.started("a")
        await here.sink.started("b")
        assert here.sink.num_steps == 1


async def test_arguments_that_the_library_refuses_are_the_callers() -> None:
    async with rig() as here:
        here.library.refuse = ValueError("logprobs must be 1")
        here.submit("r")
        await here.sink.finished("r")
        error = last(here.sink, "r").error
        assert error is not None
        assert error.kind == "InvalidRequest"
        here.library.refuse = RuntimeError("LLM is shutting down")
        here.submit("s")
        await here.sink.finished("s")
        error = last(here.sink, "s").error
        assert error is not None
        assert error.kind == "EngineFailed"
        assert len(here.suspicions) == 1


async def test_answer_that_ends_without_a_reason_is_an_error() -> None:
    async with rig() as here:
        here.submit("r")
        result = await here.library.called()
        result.say(10)
        await here.sink.started("r")
        result.fail(StopAsyncIteration())
        await here.sink.finished("r")
        assert last(here.sink, "r").finish_reason == "error"


async def test_stop_that_the_library_does_not_know_is_aborted_there() -> None:
    async with rig() as here:
        here.submit("r", stop_token_ids=(2, 30), min_tokens=1)
        result = await here.library.called()
        assert "stop_token_ids" not in result.call["sampling_params"]
        result.say(10, 30)
        await here.sink.finished("r")
        assert here.sink.tokens["r"] == [10]
        assert result.num_aborts == 1
        result.say(11, reason="cancelled")
        await here.gone()


async def test_decode_is_never_refused_for_being_busy() -> None:
    async with rig() as here:
        for n in range(3):
            here.submit(f"r{n}")
        here.submit_decode("d")
        assert len(here.requests) == 4


async def test_broken_library_ends_everything_at_once() -> None:
    async with rig() as here:
        here.submit("a")
        here.submit_decode("b")
        await here.library.called(2)
        here.requests.fail_all("it is stuck")
        await here.sink.finished("a", "b")
        for name in ("a", "b"):
            error = last(here.sink, name).error
            assert error is not None
            assert error.message == "it is stuck"
        with pytest.raises(EngineFailed, match="stuck"):
            here.submit("c")
        await here.gone()


async def test_a_guide_is_passed_with_a_prompt_and_with_a_fetch() -> None:
    guide = Guide("json_schema", "{}")
    async with rig() as here:
        here.submit("r", guide=guide)
        here.submit_decode("fetched", guide=guide)
        for result in [await here.library.called(n) for n in (1, 2)]:
            assert result.call["inputs"] == PROMPT
            assert result.call["sampling_params"]["guided_decoding"] == {"json": "{}"}
            result.say(10, reason="length")
        await here.sink.finished("r", "fetched")


async def test_a_guided_request_is_not_begun_again_after_its_first_token() -> None:
    """When its fetch fails, the grammar would start anew in the middle of the text."""
    async with rig() as here:
        here.submit_decode("r", guide=Guide("regex", "a+"))
        result = await here.library.called()
        result.fail(RuntimeError("gone"))
        await here.sink.finished("r")
        error = last(here.sink, "r").error
        assert error is not None
        assert "cannot continue a guided request" in error.message
        assert len(here.library.results) == 1


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"logit_bias": ((5, 1.0),)}, "logit_bias"),
        ({"prompt_logprobs": 0}, "logprobs"),
        ({"guide": Guide("grammar", "start: /a/")}, "guided_grammar"),
    ],
)
async def test_what_the_library_cannot_do_is_refused_by_name(
    sampling: dict[str, Any], param: str
) -> None:
    async with rig() as here:
        with pytest.raises(InvalidRequest) as caught:
            here.submit("r", **sampling)
        assert caught.value.param == param


async def test_guides_need_a_backend_and_grammars_need_llguidance() -> None:
    lark, schema = Guide("grammar", "start: /a/"), Guide("json_schema", "{}")
    check_supported(request("r", PROMPT, greedy(1, guide=lark)), "llguidance")
    check_supported(request("r", PROMPT, greedy(1, guide=schema)), "xgrammar")
    with pytest.raises(InvalidRequest, match="guided_decoding"):
        check_supported(request("r", PROMPT, greedy(1, guide=schema)), None)
