"""The course of a request when the library answers in ways that the stand-in does not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from serving.config import EngineConfig
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.requests.context import ABORT_S, RequestContext, Runtime
from serving.engine.trtllm.requests.guided import check_supported
from serving.engine.trtllm.requests.open_requests import OpenRequests
from serving.engine.trtllm.requests.sampling import Vocabulary
from serving.errors import EngineFailed, InvalidRequest
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import EngineOutput, EngineTransferParams, Guide
from unit.engine.torch_rig import Sink, greedy, request
from unit.engine.trtllm_rig import until

PROMPT = [5, 6, 7, 8]


@dataclasses.dataclass(kw_only=True)
class Params:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None


COMMITTED = Params(
    request_type="context_only", first_gen_tokens=[9], ctx_request_id=1, opaque_state=b"x"
)


class Result:
    """One call, answered by the test. `say` adds to the cumulative tokens."""

    cached_tokens: int  # in versions that tell

    def __init__(self, call: dict[str, Any]) -> None:
        self.call = call
        self.outputs = [
            SimpleNamespace(
                token_ids=[],
                finish_reason=None,
                stop_reason=None,
                logprobs=[],
                disaggregated_params=None,
                request_perf_metrics=None,
            )
        ]
        self.finished = False
        self.num_aborts = 0
        self._answers: asyncio.Queue[Any] = asyncio.Queue()

    def say(self, *tokens: int, reason: str | None = None, **more: Any) -> None:
        self._answers.put_nowait((tokens, reason, more))

    def fail(self, exc: Exception) -> None:
        self._answers.put_nowait(exc)

    def abort(self) -> None:
        self.num_aborts += 1

    def __aiter__(self) -> Result:
        return self

    async def __anext__(self) -> Result:
        if self.finished:
            raise StopAsyncIteration
        answer = await self._answers.get()
        if isinstance(answer, Exception):
            self.finished = True
            raise answer
        tokens, reason, more = answer
        output = self.outputs[0]
        output.token_ids.extend(tokens)
        output.finish_reason = reason
        vars(output).update(more)
        self.finished = reason is not None and not more.get("goes_on")
        return self


class Library:
    """Records calls; `refuse` is raised by the next one."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.refuse: Exception | None = None
        self.tells_cached = True

    def generate_async(self, **call: Any) -> Result:
        if self.refuse is not None:
            refuse, self.refuse = self.refuse, None
            raise refuse
        result = Result(call)
        if self.tells_cached:
            result.cached_tokens = 0
        self.results.append(result)
        return result

    async def called(self, times: int = 1) -> Result:
        await until(lambda: len(self.results) >= times)
        return self.results[times - 1]


@dataclasses.dataclass
class Rig:
    library: Library
    requests: OpenRequests
    sink: Sink
    stats: KvTransferTotals
    suspicions: list[None]

    async def gone(self) -> None:
        """No request is left, in the adapter."""
        await until(lambda: len(self.requests) == 0)

    def submit(self, name: str, phase: str = "agg", **sampling: Any) -> None:
        self.requests.submit(request(name, PROMPT, greedy(8, **sampling), phase=phase))

    def submit_decode(self, name: str, stop_token_id: int | None = None, **sampling: Any) -> None:
        state = {
            "params": {"ctx_request_id": 1, "opaque_state": b"x", "first_gen_tokens": [9]},
            "num_tokens": len(PROMPT),
            "stop_token_id": stop_token_id,
        }
        told = [] if stop_token_id is not None else [9]
        self.requests.submit(
            request(
                name,
                PROMPT + told,
                greedy(8, **sampling),
                num_prompt_tokens=len(PROMPT),
                phase="decode",
                kv_transfer_params=EngineTransferParams("prefill-0", 0, name, state),
            )
        )


@asynccontextmanager
async def rig(fetch_s: float = 60.0, abort_s: float = ABORT_S) -> AsyncIterator[Rig]:
    library, sink, stats = Library(), Sink(), KvTransferTotals()
    suspicions: list[None] = []
    context = RequestContext(
        runtime=Runtime(library, dict, Params, None, dict),
        outbox=Outbox(sink, LoadReport),
        instance_id="here",
        limits=EngineConfig(max_model_len=64, max_batch_size=2, max_waiting=1),
        vocabulary=Vocabulary(100, (2,), 0),
        guide_backend="xgrammar",
        fetch_s=fetch_s,
        abort_s=abort_s,
        transfers=stats,
        num_cached=len,
        suspect=lambda: suspicions.append(None),
    )
    requests = OpenRequests(context)
    yield Rig(library, requests, sink, stats, suspicions)
    await requests.close(0.0)
    assert len(requests) == 0
    assert requests.context.queued_tokens == 0


def last(sink: Sink, name: str) -> EngineOutput:
    return sink.last[name]


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


async def test_answers_of_one_turn_leave_in_one_call() -> None:
    async with rig() as here:
        here.submit("a")
        here.submit("b")
        results = [await here.library.called(n) for n in (1, 2)]
        for result in results:
            result.say(10)
        await here.sink.started("a")
        await here.sink.started("b")
        assert here.sink.num_steps == 1


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


async def test_stopped_prefill_whose_fetch_fails_is_over_all_the_same() -> None:
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


async def test_decode_is_aborted_with_its_first_answer_even_when_that_is_not_new() -> None:
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


async def test_fetch_that_never_ends_is_aborted_after_its_time() -> None:
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


async def test_a_guide_goes_along_with_a_prompt_and_with_a_fetch() -> None:
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


async def test_guides_need_a_backend_and_grammars_the_one_that_reads_them() -> None:
    lark, schema = Guide("grammar", "start: /a/"), Guide("json_schema", "{}")
    check_supported(request("r", PROMPT, greedy(1, guide=lark)), "llguidance")
    check_supported(request("r", PROMPT, greedy(1, guide=schema)), "xgrammar")
    with pytest.raises(InvalidRequest, match="guided_decoding"):
        check_supported(request("r", PROMPT, greedy(1, guide=schema)), None)
