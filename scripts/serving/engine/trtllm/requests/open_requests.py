"""OpenRequests on their way through TensorRT-LLM: one task each, from submission to the last output.

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

from serving.config import EngineConfig
from serving.engine.trtllm.outbox import Outbox
from serving.engine.trtllm.requests.completion import CompletionReader
from serving.engine.trtllm.requests.guided import check_supported, guide_arguments
from serving.engine.trtllm.requests.prefilled_kv import (
    PrefilledKv,
    committed_params,
    generation_params,
    read_handover,
)
from serving.engine.trtllm.requests.running import Running, Runtime
from serving.engine.trtllm.requests.sampling import Vocabulary, num_to_generate, sampling_arguments
from serving.engine.trtllm.requests.transfer_times import count_transfer
from serving.errors import EngineFailed, InvalidRequest, KvTransferFailed, Overloaded, ServingError
from serving.load_report import KvTransferTotals
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    EngineTransferParams,
    ErrorInfo,
    FinishReason,
)

log = logging.getLogger(__name__)

ABORT_S = 30.0
"""An aborted request whose end the library does not report within this time is given up."""


class OpenRequests:
    """Owns all requests of one engine, also those whose callers have gone."""

    def __init__(
        self,
        runtime: Runtime,
        outbox: Outbox,
        *,
        instance_id: str,
        limits: EngineConfig,
        vocabulary: Vocabulary,
        guide_backend: str | None,
        fetch_s: float,
        transfers: KvTransferTotals,
        num_cached: Callable[[list[int]], int],
        suspect: Callable[[], None],
    ) -> None:
        """`guide_backend`: what enforces guides, None: nothing. `fetch_s`: after this time a fetch counts as over. `num_cached`: of a prompt, where the
        library does not tell. `suspect` is called when it does not behave."""
        self._runtime, self._outbox = runtime, outbox
        self._instance_id, self._limits, self._vocabulary = instance_id, limits, vocabulary
        self._guide_backend = guide_backend
        self._fetch_s, self._transfers = fetch_s, transfers
        self._estimate_cached, self._suspect = num_cached, suspect
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, Running] = {}
        self._all: set[Running] = set()
        self._refusal = ""
        self.queued_tokens = 0
        self.has_heard = False  # anything at all, since somebody last looked
        self.num_unanswered_aborts = 0

    def __len__(self) -> int:
        return len(self._all)

    def submit(self, request: EngineRequest) -> None:
        """Raises InvalidRequest, Overloaded or EngineFailed."""
        if self._refusal:
            raise EngineFailed(self._refusal)
        self._check(request)
        handover = None
        if request.phase == "decode" and request.kv_transfer_params is not None:
            try:
                handover = read_handover(request)
            except KvTransferFailed as exc:
                self._count_failure(exc, is_computed_here=True)
        # A handed-over prompt holds blocks on its prefill engine until it is fetched: never refused.
        room = self._limits.max_batch_size + self._limits.max_waiting
        if handover is None and len(self._all) >= room:
            raise Overloaded(f"{room} requests run or wait in {self._instance_id}")
        running = Running(request, handover)
        self._open[request.request_id] = running
        self._all.add(running)
        self.queued_tokens += running.num_queued
        running.task = self._loop.create_task(self._serve(running), name=request.request_id)

    def abort(self, request_id: str) -> None:
        """As `TransferringEngine.abort`."""
        running = self._open.get(request_id)
        if running is None or running.is_aborted:
            return
        running.is_aborted = True
        if running.request.phase == "prefill":
            # Only the library knows whether the KV is committed already: its answer is told.
            self._stop(running)
            return
        self._close(running, EngineOutput(request_id, [], "cancelled"))
        if running.is_fetching:
            running.timer = self._loop.call_later(self._fetch_s, self._stop, running)
        else:
            self._stop(running)

    def fail_all(self, why: str) -> None:
        """The library does not work any more: end everything, and refuse what comes."""
        self._refusal = why
        for running in list(self._all):
            self._fail(running, EngineFailed(why))
            running.task.cancel()

    async def close(self, within_s: float) -> None:
        """Abort everything and wait for the library to be done with it."""
        self._refusal = self._refusal or "the engine is closing"
        for request_id in list(self._open):
            self.abort(request_id)
        tasks = [running.task for running in self._all]
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)
        for running in list(self._all):
            self._close(running, EngineOutput(running.request.request_id, [], "cancelled"))
            running.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, request: EngineRequest) -> None:
        tokens, max_model_len = request.token_ids, self._limits.max_model_len
        if not 1 <= request.num_prompt_tokens <= len(tokens):
            raise InvalidRequest("the prompt is empty", code="empty_prompt")
        if len(tokens) + 1 > max_model_len:
            raise InvalidRequest(
                f"{len(tokens)} tokens leave no room for output: the context is "
                f"{max_model_len} tokens",
                code="context_length_exceeded",
            )
        if min(tokens) < 0 or max(tokens) >= self._vocabulary.size:
            raise InvalidRequest(
                f"token ids must be below {self._vocabulary.size}", code="invalid_token"
            )
        num_to_generate(request, len(tokens), max_model_len)
        check_supported(request, self._guide_backend)
        if request.request_id in self._open:
            raise InvalidRequest(f"{request.request_id} is already running", code="duplicate_id")

    # --- one request ---------------------------------------------------------------------------

    async def _serve(self, running: Running) -> None:
        request = running.request
        try:
            if running.handover is not None and await self._decode(running, running.handover):
                return
            if not running.is_aborted:
                await self._compute(running)
        except ServingError as exc:
            self._fail(running, exc)
        except Exception as exc:
            log.exception("%s failed", request.request_id)
            self._fail(running, EngineFailed(f"{type(exc).__name__}: {exc}"))
            self._suspect()
        finally:
            if running.timer is not None:
                running.timer.cancel()
            self._unqueue(running)
            self._close(running, EngineOutput(request.request_id, [], "cancelled"))
            self._all.discard(running)

    async def _compute(self, running: Running) -> None:
        """Phases `agg` and `prefill`, and what is left of a `decode` without its KV."""
        request = running.request
        num_prompt = len(request.token_ids)
        max_tokens = num_to_generate(request, num_prompt, self._limits.max_model_len)
        is_prefill = request.phase == "prefill"
        more = {}
        # With one token to generate no decode follows, and nothing may be held for one.
        if is_prefill and max_tokens > 1:
            params = self._runtime.disaggregated_params(request_type="context_only")
            more["disaggregated_params"] = params
        arguments = sampling_arguments(
            request,
            num_prompt=num_prompt,
            max_tokens=1 if is_prefill else max_tokens,
            vocabulary=self._vocabulary,
        )
        arguments |= self._guided(request, num_prompt)
        await self._follow(
            running,
            CompletionReader(request, num_prompt),
            inputs=request.token_ids,
            sampling_params=self._runtime.sampling_params(**arguments),
            streaming=not is_prefill,
            **more,
        )

    async def _decode(self, running: Running, handover: PrefilledKv) -> bool:
        """Fetch and go on. False: the fetch failed, and the prompt is to be computed here."""
        request, runtime = running.request, self._runtime
        num_prompt = handover.num_tokens
        try:
            params = generation_params(
                handover, request, runtime.disaggregated_params, runtime.logprob
            )
            arguments = sampling_arguments(
                request,
                num_prompt=num_prompt,
                max_tokens=num_to_generate(request, num_prompt, self._limits.max_model_len),
                vocabulary=self._vocabulary,
            )
            arguments |= self._guided(request, num_prompt)
            await self._follow(
                running,
                CompletionReader(request, num_prompt),
                inputs=request.token_ids[:num_prompt],
                sampling_params=runtime.sampling_params(**arguments, return_perf_metrics=True),
                streaming=True,
                disaggregated_params=runtime.disaggregated_params(**params),
            )
        except KvTransferFailed as exc:
            running.handover = running.result = None
            if handover.stop_token_id is not None:
                self._close(running, self._stopped(request, handover))
            self._count_failure(exc, is_computed_here=running.is_open)
            if not running.is_open:
                return True
            running.num_queued = len(request.token_ids)
            self.queued_tokens += running.num_queued
            return False
        return True

    def _guided(self, request: EngineRequest, num_prompt: int) -> dict[str, Any]:
        """The keyword argument of `SamplingParams`, if any. Raises EngineFailed."""
        said = guide_arguments(request, num_prompt)
        if not said:
            return {}
        return {"guided_decoding": self._runtime.guided_decoding_params(**said)}

    async def _follow(self, running: Running, generation: CompletionReader, **call: Any) -> None:
        """Run one call of `generate_async` to its end, telling what is to be told."""
        try:
            result = self._runtime.llm.generate_async(**call)
        except ValueError as exc:
            if running.is_fetching:
                raise self._transfer_failed(running, exc) from exc
            raise InvalidRequest(str(exc)) from exc
        running.result = result
        if not hasattr(result, "cached_tokens") and running.handover is None:
            running.num_cached = self._estimate_cached(running.request.token_ids)
        advance, put = generation.advance, self._outbox.put
        try:
            async for step in result:
                self.has_heard = True
                completion = step.outputs[0]
                if not running.has_begun:
                    self._begin(running, step, completion)
                output = advance(completion)
                if output is None or not running.is_open:
                    continue
                if running.num_cached is not None:
                    output = msgspec.structs.replace(output, cached_tokens=running.num_cached)
                    running.num_cached = None
                if output.finish_reason is None:
                    put(output)
                else:
                    self._finish(running, step, completion, output, call)
            if running.handover is not None and result.outputs:
                count_transfer(self._transfers, result.outputs[0])
        except ServingError:
            raise
        except Exception as exc:
            if running.is_fetching:
                raise self._transfer_failed(running, exc) from exc
            self._suspect()
            raise EngineFailed(f"TensorRT-LLM: {type(exc).__name__}: {exc}") from exc
        if running.is_open and not running.is_aborted:
            raise EngineFailed("TensorRT-LLM ended it without saying why")

    def _begin(self, running: Running, step: Any, completion: Any) -> None:
        """The library's first answer: the prompt is computed, or fetched."""
        handover = running.handover
        if handover is None:
            cached = getattr(step, "cached_tokens", None)
            running.num_cached = running.num_cached if cached is None else int(cached)
        else:
            reason = completion.finish_reason
            if reason in ("cancelled", "timeout") and not running.is_stopping:
                raise self._transfer_failed(running, f"it was {reason}")
            self._transfers.kv_transfers += 1
            running.num_cached = handover.num_tokens
        running.has_begun = True
        self._unqueue(running)
        if handover is not None and handover.stop_token_id is not None:
            self._close(running, self._stopped(running.request, handover))
            running.is_aborted = True
        if running.is_aborted and handover is not None:
            self._stop(running)

    def _finish(
        self,
        running: Running,
        step: Any,
        completion: Any,
        output: EngineOutput,
        call: dict[str, Any],
    ) -> None:
        """Tell the last output; with a prefill, who may fetch what."""
        if running.request.phase == "prefill" and "disaggregated_params" in call:
            output = self._offer(running, completion, output)
        self._close(running, output)
        if not step.finished:
            self._stop(running)  # a stop that the library does not know of

    def _offer(self, running: Running, completion: Any, output: EngineOutput) -> EngineOutput:
        if output.finish_reason not in ("length", "stop"):
            return output
        request = running.request
        params = committed_params(completion.disaggregated_params)
        if params is None:
            if output.finish_reason == "stop":
                return output
            raise EngineFailed("TensorRT-LLM prefilled the prompt and offers no KV for it")
        # Also after a stop: what is held must be fetched, and the decode engine knows why.
        handover = PrefilledKv(params, len(request.token_ids), output.stop_token_id)
        return msgspec.structs.replace(
            output,
            finish_reason="length",
            stop_token_id=None,
            kv_transfer_params=EngineTransferParams(
                self._instance_id, 0, request.request_id, handover.state()
            ),
        )

    # --- ends ----------------------------------------------------------------------------------

    def _close(self, running: Running, output: EngineOutput) -> None:
        """Tell `output` as the last one, unless one was told."""
        if running.is_open:
            running.is_open = False
            del self._open[running.request.request_id]
            self._outbox.put(output)

    def _fail(self, running: Running, exc: ServingError) -> None:
        retry_after_s = float(getattr(exc, "retry_after_s", 1.0))
        error = ErrorInfo(type(exc).__name__, str(exc), retry_after_s)
        reason: FinishReason = "error"
        self._close(running, EngineOutput(running.request.request_id, [], reason, error=error))

    def _stop(self, running: Running) -> None:
        """Abort for real."""
        if running.is_stopping:
            return
        running.is_stopping = True
        if running.timer is not None:
            running.timer.cancel()
        running.timer = self._loop.call_later(ABORT_S, self._give_up, running)
        if running.result is not None:
            running.result.abort()

    def _give_up(self, running: Running) -> None:
        log.error(
            "%s: TensorRT-LLM did not answer its abort for %g s",
            running.request.request_id,
            ABORT_S,
        )
        self.num_unanswered_aborts += 1
        self._suspect()
        running.task.cancel()

    def _unqueue(self, running: Running) -> None:
        self.queued_tokens -= running.num_queued
        running.num_queued = 0

    def _count_failure(self, exc: KvTransferFailed, *, is_computed_here: bool) -> None:
        log.warning("%s; %s", exc, "prefilling here instead" if is_computed_here else "not wanted")
        self._transfers.kv_transfer_failures += 1
        self._transfers.local_prefill_fallbacks += is_computed_here

    @staticmethod
    def _stopped(request: EngineRequest, handover: PrefilledKv) -> EngineOutput:
        return EngineOutput(
            request.request_id,
            [],
            "stop",
            cached_tokens=handover.num_tokens,
            stop_token_id=handover.stop_token_id,
        )

    @staticmethod
    def _transfer_failed(running: Running, why: object) -> KvTransferFailed:
        params = running.request.kv_transfer_params
        source = params.source_instance if params is not None else "nobody"
        return KvTransferFailed(running.request.request_id, source, f"TensorRT-LLM: {why}")
