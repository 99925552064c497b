"""A request whose KV is handed over, when the library answers in unusual ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from serving.protocol import EngineTransferParams
from unit.engine.trtllm.requests.fake_library import (
    COMMITTED,
    PROMPT,
    Result,
    last,
    rig,
)
from unit.engine.trtllm_rig import until


async def test_prefill_that_stops_on_a_token_after_committing_lets_its_kv_be_fetched() -> None:
    """`max_tokens` is checked before stop ids, so such a context keeps its KV."""
    async with rig() as here:
        here.submit("r", phase="prefill", stop_token_ids=(2, 9))
        result = await here.library.called()
        assert result.call["streaming"] is False
        assert result.call["disaggregated_params"].request_type == "context_only"
        result.say(9, reason="length", disaggregated_params=COMMITTED)
        await here.sink.finished("r")
        offered = last(here.sink, "r")
        assert (offered.token_ids, offered.finish_reason) == ([], "length")
        params = offered.kv_transfer_params
        assert isinstance(params, EngineTransferParams)
        assert params.state["stop_token_id"] == 9


async def test_decode_of_a_stopped_prefill_fetches_and_ends() -> None:
    async with rig() as here:
        here.submit_decode("r", stop_token_id=9)
        result = await here.library.called()
        assert result.call["disaggregated_params"].request_type == "generation_only"
        result.say(9, 10)
        await here.sink.finished("r")
        ended = last(here.sink, "r")
        assert (ended.token_ids, ended.finish_reason, ended.stop_token_id) == ([], "stop", 9)
        assert result.num_aborts == 1
        assert here.stats.kv_transfers == 1
        result.say(reason="cancelled")
        await here.gone()


async def test_failed_fetch_of_a_stopped_prefill_still_ends_the_request() -> None:
    async with rig() as here:
        here.submit_decode("r", stop_token_id=9)
        (await here.library.called()).fail(RuntimeError("no peer"))
        await here.sink.finished("r")
        assert last(here.sink, "r").finish_reason == "stop"
        assert len(here.library.results) == 1


async def test_prefill_without_kv_to_offer_is_an_error_not_an_answer() -> None:
    async with rig() as here:
        here.submit("r", phase="prefill")
        (await here.library.called()).say(9, reason="length")
        await here.sink.finished("r")
        error = last(here.sink, "r").error
        assert error is not None
        assert "offers no KV" in error.message


async def test_abort_that_comes_too_late_offers_the_kv_that_is_held() -> None:
    async with rig() as here:
        here.submit("r", phase="prefill")
        result = await here.library.called()
        here.requests.abort("r")
        assert result.num_aborts == 1
        assert "r" not in here.sink.last
        result.say(9, reason="not_finished", disaggregated_params=COMMITTED)
        await here.sink.finished("r")
        assert last(here.sink, "r").finish_reason == "length"
        assert last(here.sink, "r").kv_transfer_params is not None


async def test_aborted_decode_stops_with_its_first_answer() -> None:
    async with rig() as here:
        here.submit_decode("r")
        result = await here.library.called()
        here.requests.abort("r")
        await here.sink.finished("r")
        assert result.num_aborts == 0
        result.say(9)  # the token that the prefill told
        await until(lambda: result.num_aborts)
        result.say(10, 11, reason="cancelled")
        await here.gone()
        assert here.sink.tokens["r"] == []  # "cancelled" was told before


async def test_unfinished_fetch_is_aborted_at_its_deadline() -> None:
    async with rig(fetch_s=0.01) as here:
        here.submit_decode("r")
        result = await here.library.called()
        here.requests.abort("r")
        await until(lambda: result.num_aborts)
        result.say(reason="cancelled")
        await here.gone()
        assert here.stats.kv_transfer_failures == 0


async def test_an_unanswered_abort_expires_and_makes_the_library_suspect() -> None:
    async with rig(abort_s=0.01) as here:
        here.submit("a")
        here.submit("p", phase="prefill")
        await here.library.called(2)
        here.requests.abort("a")
        here.requests.abort("p")
        await here.gone()
        assert here.requests.context.num_unanswered_aborts == 2
        assert len(here.suspicions) == 2
        await here.sink.finished("a", "p")
        assert last(here.sink, "p").finish_reason == "cancelled"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.fail(RuntimeError("fetch failed")),
        lambda result: result.say(reason="cancelled"),
        lambda result: result.say(reason="timeout"),
    ],
)
async def test_fetch_that_fails_is_computed_here(spoil: Callable[[Result], None]) -> None:
    async with rig() as here:
        here.submit_decode("r")
        spoil(await here.library.called())
        again = await here.library.called(2)
        assert again.call["inputs"] == [*PROMPT, 9]
        assert again.call["sampling_params"]["max_tokens"] == 7
        assert "disaggregated_params" not in again.call
        assert here.requests.context.queued_tokens == 5
        again.say(10, reason="length")
        await here.sink.finished("r")
        assert here.sink.tokens["r"] == [10]
        assert (
            here.stats.kv_transfer_failures,
            here.stats.local_prefill_fallbacks,
            here.stats.kv_transfers,
        ) == (1, 1, 0)
        assert here.suspicions == []


async def test_failed_fetch_of_an_aborted_decode_is_not_computed() -> None:
    async with rig() as here:
        here.submit_decode("r")
        result = await here.library.called()
        here.requests.abort("r")
        result.fail(RuntimeError("fetch failed"))
        await here.gone()
        assert len(here.library.results) == 1
        assert (here.stats.kv_transfer_failures, here.stats.local_prefill_fallbacks) == (1, 0)


async def test_error_after_the_fetch_is_the_requests_own() -> None:
    async with rig() as here:
        here.submit_decode("r")
        result = await here.library.called()
        result.say(9, 10)
        result.fail(RuntimeError("illegal memory access"))
        await here.sink.finished("r")
        error = last(here.sink, "r").error
        assert error is not None
        assert "illegal memory access" in error.message
        assert len(here.library.results) == 1
        assert len(here.suspicions) == 1
