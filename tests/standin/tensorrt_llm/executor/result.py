"""Test code. Results as the caller sees them: filled on its loop, from responses of another thread.

`__anext__` takes one response and returns the same object again; `token_ids` is one list that
grows, until a stop token makes it a new and shorter one.
"""

from __future__ import annotations

import asyncio
import json
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm import _generate, _touches
from tensorrt_llm.executor.utils import RequestError

_MODULE = "tensorrt_llm.executor.result"

Logprob: Any = _generate.record("Logprob", _MODULE)


class _Diffs:
    __slots__ = ()

    @property
    def length(self: Any) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self: Any) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self: Any) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self: Any) -> list[Any]:
        return self.logprobs[self._last_logprobs_len :]


CompletionOutput: Any = _generate.record(
    "CompletionOutput",
    _MODULE,
    bases=(_Diffs,),
    hidden={"_last_text_len": 0, "_last_token_ids_len": 0, "_last_logprobs_len": 0},
)


@dataclass(slots=True)
class Response:
    """What the engine's thread says of one request. `num_old` leading tokens are the context's."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[Any] | None = None
    num_old: int = 0
    stop_reason: int | None = None
    cut_stop_token: bool = False
    cached_tokens: int | None = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    error: str | None = None


class Inbox:
    """A queue between threads: its reader waits on the loop where it was made, or blocks."""

    def __init__(self) -> None:
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._items: deque[Any] = deque()
        self._news = asyncio.Event()
        self._blocking: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        if self._loop is None:
            self._blocking.put(item)
            return
        self._items.append(item)
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._news.set)
            except RuntimeError:  # closed between the two
                self._items.clear()

    async def get(self, timeout: float | None = None) -> Any:
        """Raises TimeoutError."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this result belongs to another event loop")
        if not self._items:
            async with asyncio.timeout(timeout):
                while not self._items:
                    self._news.clear()
                    await self._news.wait()
        return self._items.popleft()

    def get_blocking(self, timeout: float | None = None) -> Any:
        """Raises queue.Empty."""
        if self._loop is not None:
            return self._items.popleft() if self._items else self._blocking.get(timeout=timeout)
        return self._blocking.get(timeout=timeout)


class GenerationResult(_touches.Watched):
    """One request: awaitable for its end, iterable for what comes."""

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        sampling_params: Any,
        abort: Callable[[int], None],
        decode: Callable[[list[int]], str] | None,
        disaggregated_params: Any,
    ) -> None:
        self._id, self._prompt_token_ids = request_id, prompt_token_ids
        self._sampling_params, self._abort, self._decode = sampling_params, abort, decode
        self.disaggregated_params = disaggregated_params
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, Any] = {}
        self._done = self._aborted = False
        self._outputs = [CompletionOutput(index=0)]
        self._inbox = Inbox()

    @property
    def request_id(self) -> int:
        return self._id

    @property
    def prompt(self) -> str | None:
        return None

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._prompt_token_ids

    @property
    def outputs(self) -> list[Any]:
        return self._outputs

    @property
    def finished(self) -> bool:
        return self._done

    @property
    def context_logits(self) -> None:
        return None

    def abort(self) -> None:
        self._abort(self._id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> GenerationResult:
        while not self._done:
            self._handle(self._inbox.get_blocking(timeout))
        return self

    async def aresult(self) -> GenerationResult:
        while not self._done:
            self._handle(await self._inbox.get())
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> AsyncIterator[GenerationResult]:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._done:
            raise StopAsyncIteration
        self._handle(await self._inbox.get())
        return self

    def _handle(self, response: Response) -> None:
        if response.error is not None:
            self._done = True
            raise RequestError(response.error)
        output = self._outputs[0]
        if response.disaggregated_params is not None:
            self.disaggregated_params = response.disaggregated_params
        output.disaggregated_params = self.disaggregated_params
        if response.cached_tokens is not None:
            self.cached_tokens = response.cached_tokens
        self.decoding_iter += 1
        # The first response of a generation repeats the context's token, and the difference
        # leaves it out.
        output._last_token_ids_len = len(output.token_ids) + response.num_old
        output.token_ids.extend(response.token_ids)
        if response.logprobs is not None:
            output._last_logprobs_len = len(output.logprobs)
            output.logprobs.extend(response.logprobs)
        if response.request_perf_metrics is not None:
            output.request_perf_metrics = response.request_perf_metrics
        if response.finish_reason is not None:
            self._done = True
            output.finish_reason = response.finish_reason
            output.stop_reason = response.stop_reason
            if response.cut_stop_token and not self._sampling_params.include_stop_str_in_output:
                output.token_ids = output.token_ids[:-1]
        if self._decode is not None:
            self._detokenize(output)

    def _detokenize(self, output: Any) -> None:
        output._last_text_len = len(output.text)
        output.text = self._decode(output.token_ids) if self._decode else ""
        stop = self._sampling_params.stop
        for text in [stop] if isinstance(stop, str) else stop or []:
            if text in output.text:
                keep = len(text) if self._sampling_params.include_stop_str_in_output else 0
                output.text = output.text[: output.text.find(text) + keep]
                output.finish_reason, output.stop_reason = "stop", text
                self.abort()
                self._done = True
                return


RequestOutput: Any = type("RequestOutput", (GenerationResult,), {"__module__": _MODULE})


class IterationResult(_touches.Watched):
    """KV events or statistics. One per LLM and kind, made by the first request on its loop.

    A wait that times out ends the iteration, and only the next request revives it.
    """

    def __init__(self) -> None:
        self._inbox = Inbox()
        self._done = False
        self._timeout: float | None = 2

    def set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def mark_undone(self) -> None:
        self._done = False

    def put(self, item: str) -> None:
        self._inbox.put(item)

    def get_results(self) -> list[dict[str, Any]]:
        results = []
        while not self._done:
            try:
                results.append(json.loads(self._inbox.get_blocking(self._timeout)))
            except queue.Empty:
                self._done = True
        return results

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        try:
            item = await self._inbox.get(self._timeout)
        except TimeoutError:
            self._done = True
            raise StopAsyncIteration from None
        return json.loads(item)
