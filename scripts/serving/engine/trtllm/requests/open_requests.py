"""All requests of one TensorRT-LLM engine: admission, abort, and the end of everything."""

from __future__ import annotations

import asyncio

from serving.engine.base import refuse_pooling, require_runnable
from serving.engine.trtllm.requests.context import RequestContext
from serving.engine.trtllm.requests.guided import check_supported
from serving.engine.trtllm.requests.prefilled_kv import read_prefilled_kv
from serving.engine.trtllm.requests.running import RunningRequest
from serving.errors import EngineFailed, InvalidRequest, KvTransferFailed, Overloaded
from serving.protocol import EngineRequest


class OpenRequests:
    """Owns the requests, including those whose callers have gone but which the library still runs."""

    def __init__(self, context: RequestContext) -> None:
        self.context = context
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, RunningRequest] = {}  # the last output is not delivered yet
        self._all: set[RunningRequest] = set()
        self._refusal = ""

    def __len__(self) -> int:
        return len(self._all)

    def submit(self, request: EngineRequest) -> None:
        """Raises InvalidRequest, Overloaded or EngineFailed."""
        if self._refusal:
            raise EngineFailed(self._refusal)
        check_supported(request, self.context.guide_backend)
        refuse_pooling(request, "tensorrt_llm")
        require_runnable(
            request, self.context.limits.resolved_context, self.context.vocabulary.size
        )
        if request.request_id in self._open:
            raise InvalidRequest(f"{request.request_id} is already running", code="duplicate_id")
        kv = None
        if request.phase == "decode" and request.kv_transfer_params is not None:
            try:
                kv = read_prefilled_kv(request)
            except KvTransferFailed as exc:
                self.context.count_failed_transfer(exc, is_computed_here=True)
        # Handed-over KV holds blocks on its prefill engine until it is fetched: never refused.
        limits = self.context.limits
        room = limits.max_batch_size + limits.max_waiting
        if kv is None and len(self._all) >= room:
            raise Overloaded(f"{room} requests run or wait in {self.context.instance_id}")
        running = RunningRequest(request, kv, self.context, on_closed=self._closed)
        self._open[request.request_id] = running
        self._all.add(running)
        running.task = self._loop.create_task(self._run(running), name=request.request_id)

    def abort(self, request_id: str) -> None:
        """As `TransferringEngine.abort`."""
        running = self._open.get(request_id)
        if running is not None:
            running.abort()

    def fail_all(self, why: str) -> None:
        """The library no longer works: end every request, and refuse new ones."""
        self._refusal = why
        for running in list(self._all):
            running.fail(EngineFailed(why))
            running.task.cancel()

    async def close(self, within_s: float) -> None:
        """Abort every request, and wait for the library to finish with it."""
        self._refusal = self._refusal or "the engine is closing"
        for request_id in list(self._open):
            self.abort(request_id)
        tasks = [running.task for running in self._all]
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)
        for running in list(self._all):
            running.cancel()
            running.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, running: RunningRequest) -> None:
        try:
            await running.run()
        finally:
            self._all.discard(running)

    def _closed(self, running: RunningRequest) -> None:
        del self._open[running.request.request_id]
