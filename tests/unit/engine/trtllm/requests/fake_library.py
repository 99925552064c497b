"""A library whose answers a test gives one by one, and the requests of an engine over it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from serving.config import EngineConfig
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.requests.context import ABORT_S, RequestContext, Runtime
from serving.engine.trtllm.requests.open_requests import OpenRequests
from serving.engine.trtllm.requests.sampling import Vocabulary
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import EngineOutput, EngineTransferParams
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
