"""One request on its way through TensorRT-LLM, from submission to its last output.

Three rules come from how the library hands KV over. A prefill that has committed its KV holds it
until it is fetched, so a stop after that point changes nothing and the KV is offered anyway. A
decode is only aborted once its fetch is over, whether the caller is still there or not. A decode
whose fetch fails computes its prompt here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from serving.engine.trtllm.requests.completion import CompletionReader
from serving.engine.trtllm.requests.context import RequestContext
from serving.engine.trtllm.requests.guided import guide_arguments
from serving.engine.trtllm.requests.prefilled_kv import (
    PrefilledKv,
    committed_params,
    generation_params,
)
from serving.engine.trtllm.requests.sampling import num_to_generate, sampling_arguments
from serving.engine.trtllm.requests.transfer_times import count_transfer
from serving.errors import EngineFailed, InvalidRequest, KvTransferFailed, ServingError
from serving.protocol import EngineOutput, EngineRequest, EngineTransferParams, ErrorInfo

log = logging.getLogger(__name__)


class RunningRequest:
    """A request that the library runs. Its caller has its last output once `is_open` is False."""

    __slots__ = (
        "_aborted",
        "_context",
        "_kv",
        "_num_cached",
        "_num_queued",
        "_on_closed",
        "_result",
        "_started",
        "_stopping",
        "_timer",
        "is_open",
        "request",
        "task",
    )

    def __init__(
        self,
        request: EngineRequest,
        kv: PrefilledKv | None,
        context: RequestContext,
        *,
        on_closed: Callable[[RunningRequest], None],
    ) -> None:
        """`kv` is to be fetched; None: the prompt is computed here. The owner sets `task`."""
        self.request = request
        self.is_open = True
        self.task: asyncio.Task[None]
        self._context, self._on_closed = context, on_closed
        self._kv = kv
        self._started = False  # the library has answered: the prompt is computed, or fetched
        self._aborted = False
        self._stopping = False  # the library is asked to stop
        self._num_cached: int | None = None  # goes with the first output
        self._result: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._num_queued = 0
        if kv is None:
            self._enqueue()

    @property
    def _is_fetching(self) -> bool:
        return self._kv is not None and not self._started

    async def run(self) -> None:
        """Deliver every output of the request, an error among them."""
        try:
            if self._kv is not None and await self._decode(self._kv):
                return
            if not self._aborted:
                await self._compute()
        except ServingError as exc:
            self.fail(exc)
        except Exception as exc:
            log.exception("%s failed", self.request.request_id)
            self.fail(EngineFailed(f"{type(exc).__name__}: {exc}"))
            self._context.suspect()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._dequeue()
            self.cancel()

    # --- the end -------------------------------------------------------------------------------

    def abort(self) -> None:
        """As `TransferringEngine.abort`."""
        if self._aborted:
            return
        self._aborted = True
        if self.request.phase == "prefill":
            # Only the library knows whether the KV is committed already: its answer decides.
            self._stop()
            return
        self.cancel()
        if self._is_fetching:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._context.fetch_s, self._stop)
        else:
            self._stop()

    def cancel(self) -> None:
        """End it for its caller, unless it has ended."""
        self._close(EngineOutput(self.request.request_id, [], "cancelled"))

    def fail(self, exc: ServingError) -> None:
        """End it with an error, unless it has ended."""
        error = ErrorInfo.from_error(exc)
        self._close(EngineOutput(self.request.request_id, [], "error", error=error))

    def _close(self, output: EngineOutput) -> None:
        """Deliver `output` as the last one, unless one was delivered."""
        if self.is_open:
            self.is_open = False
            self._on_closed(self)
            self._context.outbox.put(output)

    def _stop(self) -> None:
        """Ask the library to stop."""
        if self._stopping:
            return
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._context.abort_s, self._abort_expired)
        if self._result is not None:
            self._result.abort()

    def _abort_expired(self) -> None:
        log.error(
            "%s: TensorRT-LLM did not answer its abort for %g s",
            self.request.request_id,
            self._context.abort_s,
        )
        self._context.num_unanswered_aborts += 1
        self._context.suspect()
        self.task.cancel()

    # --- calls of the library ------------------------------------------------------------------

    async def _compute(self) -> None:
        """Phases `agg` and `prefill`, and the rest of a `decode` without its KV."""
        request, runtime = self.request, self._context.runtime
        num_prompt = len(request.token_ids)
        max_tokens = self._num_to_generate(num_prompt)
        is_prefill = request.phase == "prefill"
        disaggregated = {}
        # With one token to generate no decode follows, and no KV may be held for one.
        if is_prefill and max_tokens > 1:
            params = runtime.disaggregated_params(request_type="context_only")
            disaggregated["disaggregated_params"] = params
        arguments = self._sampling_arguments(num_prompt, 1 if is_prefill else max_tokens)
        await self._follow(
            CompletionReader(request, num_prompt),
            inputs=request.token_ids,
            sampling_params=runtime.sampling_params(**arguments),
            streaming=not is_prefill,
            **disaggregated,
        )

    async def _decode(self, kv: PrefilledKv) -> bool:
        """Fetch the KV and go on from it. False: the fetch failed, so compute the prompt here."""
        request, runtime = self.request, self._context.runtime
        num_prompt = kv.num_tokens
        try:
            params = generation_params(kv, request, runtime.disaggregated_params, runtime.logprob)
            arguments = self._sampling_arguments(num_prompt, self._num_to_generate(num_prompt))
            await self._follow(
                CompletionReader(request, num_prompt),
                inputs=request.token_ids[:num_prompt],
                sampling_params=runtime.sampling_params(**arguments, return_perf_metrics=True),
                streaming=True,
                disaggregated_params=runtime.disaggregated_params(**params),
            )
        except KvTransferFailed as exc:
            self._kv = self._result = None
            if kv.stop_token_id is not None:
                self._close(self._stopped_output(kv))
            self._context.count_failed_transfer(exc, is_computed_here=self.is_open)
            if not self.is_open:
                return True
            self._enqueue()
            return False
        return True

    async def _follow(self, reader: CompletionReader, **call: Any) -> None:
        """Run one call of `generate_async` to its end, and deliver its outputs."""
        try:
            result = self._context.runtime.llm.generate_async(**call)
        except ValueError as exc:
            if self._is_fetching:
                raise self._transfer_failed(exc) from exc
            raise InvalidRequest(str(exc)) from exc
        self._result = result
        if not hasattr(result, "cached_tokens") and self._kv is None:
            self._num_cached = self._context.num_cached(self.request.token_ids)
        context, advance, put = self._context, reader.advance, self._context.outbox.put
        try:
            async for step in result:
                context.has_output = True
                completion = step.outputs[0]
                if not self._started:
                    self._begin(step, completion)
                output = advance(completion)
                if output is None or not self.is_open:
                    continue
                if self._num_cached is not None:
                    output = msgspec.structs.replace(output, cached_tokens=self._num_cached)
                    self._num_cached = None
                if output.finish_reason is None:
                    put(output)
                else:
                    self._finish(step, completion, output, holds_kv="disaggregated_params" in call)
            if self._kv is not None and result.outputs:
                count_transfer(context.transfers, result.outputs[0])
        except ServingError:
            raise
        except Exception as exc:
            if self._is_fetching:
                raise self._transfer_failed(exc) from exc
            context.suspect()
            raise EngineFailed(f"TensorRT-LLM: {type(exc).__name__}: {exc}") from exc
        if self.is_open and not self._aborted:
            raise EngineFailed("TensorRT-LLM ended it without a finish reason")

    def _begin(self, step: Any, completion: Any) -> None:
        """The library's first answer: the prompt is computed, or fetched."""
        kv = self._kv
        if kv is None:
            cached = getattr(step, "cached_tokens", None)
            self._num_cached = self._num_cached if cached is None else int(cached)
        else:
            reason = completion.finish_reason
            if reason in ("cancelled", "timeout") and not self._stopping:
                raise self._transfer_failed(f"it was {reason}")
            self._context.transfers.kv_transfers += 1
            self._num_cached = kv.num_tokens
        self._started = True
        self._dequeue()
        if kv is not None and kv.stop_token_id is not None:
            self._close(self._stopped_output(kv))
            self._aborted = True
        if self._aborted and kv is not None:
            self._stop()

    def _finish(self, step: Any, completion: Any, output: EngineOutput, *, holds_kv: bool) -> None:
        """Deliver the last output; a prefill's carries the parameters to fetch its KV."""
        if self.request.phase == "prefill" and holds_kv:
            output = self._with_kv_offer(completion, output)
        self._close(output)
        if not step.finished:
            self._stop()  # a stop that the library does not know of

    def _with_kv_offer(self, completion: Any, output: EngineOutput) -> EngineOutput:
        if output.finish_reason not in ("length", "stop"):
            return output
        request = self.request
        params = committed_params(completion.disaggregated_params)
        if params is None:
            if output.finish_reason == "stop":
                return output
            raise EngineFailed("TensorRT-LLM prefilled the prompt and offers no KV for it")
        # Also after a stop: held KV must be fetched, and the decode engine learns why.
        kv = PrefilledKv(params, len(request.token_ids), output.stop_token_id)
        return msgspec.structs.replace(
            output,
            finish_reason="length",
            stop_token_id=None,
            kv_transfer_params=EngineTransferParams(
                self._context.instance_id, 0, request.request_id, kv.state()
            ),
        )

    # --- pieces --------------------------------------------------------------------------------

    def _num_to_generate(self, num_prompt: int) -> int:
        return num_to_generate(self.request, num_prompt, self._context.limits.resolved_context)

    def _sampling_arguments(self, num_prompt: int, max_tokens: int) -> dict[str, Any]:
        """Keyword arguments of `SamplingParams`. Raises EngineFailed for a continued guide."""
        context = self._context
        arguments = sampling_arguments(
            self.request,
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            vocabulary=context.vocabulary,
        )
        if guide := guide_arguments(self.request, num_prompt):
            arguments["guided_decoding"] = context.runtime.guided_decoding_params(**guide)
        return arguments

    def _enqueue(self) -> None:
        """Its whole prompt waits to be computed here."""
        self._num_queued = len(self.request.token_ids)
        self._context.queued_tokens += self._num_queued

    def _dequeue(self) -> None:
        self._context.queued_tokens -= self._num_queued
        self._num_queued = 0

    def _stopped_output(self, kv: PrefilledKv) -> EngineOutput:
        return EngineOutput(
            self.request.request_id,
            [],
            "stop",
            cached_tokens=kv.num_tokens,
            stop_token_id=kv.stop_token_id,
        )

    def _transfer_failed(self, why: object) -> KvTransferFailed:
        params = self.request.kv_transfer_params
        source = params.source_instance if params is not None else "no instance"
        return KvTransferFailed(self.request.request_id, source, f"TensorRT-LLM: {why}")
