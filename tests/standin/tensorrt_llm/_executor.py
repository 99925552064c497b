"""Test code. The torch engine on a thread and event loop of its own, driven by requests.

The caller's loop and this one meet only in `submit`, `abort` and the results' inboxes, as the
real engine's processes do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec
from serving.config import EngineConfig
from serving.errors import ServingError
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams

from tensorrt_llm import _books, _contract, _failures, _handover
from tensorrt_llm._engine import Engine
from tensorrt_llm._request import Job, now
from tensorrt_llm._settings import Settings
from tensorrt_llm._stats import Stats
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import IterationResult, Response

log = logging.getLogger(__name__)

_NO_TRANSCEIVER = "cache_transceiver_config is not set: a disaggregated request cannot be served"
_CLOSE_S = 60.0


class Executor:
    """Everything below `submit` and `abort` runs on the engine's own loop."""

    def __init__(self, settings: Settings) -> None:
        """Blocks until the engine is ready. Raises what went wrong, behind a RuntimeError."""
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._stats = Stats(settings)
        self._waiting_stats: deque[str] = deque(maxlen=settings.max_stats)
        self._contexts: _handover.Contexts | None = None
        self._num_requests = 0
        self._aborted: Counter[str] = Counter()
        self.stats_result: IterationResult | None = None
        self.events_result: IterationResult | None = None
        self.is_shut_down = False
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._engine: Engine
        self._thread = threading.Thread(target=self._main, name="standin-executor", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise RuntimeError("Executor worker returned error") from self._error

    # --- the caller's threads ------------------------------------------------------------------

    def begin_results(self) -> None:
        """The first request makes the results of events and stats, each later one revives them."""
        if self.events_result is None or self.stats_result is None:
            self.events_result, self.stats_result = IterationResult(), IterationResult()
        else:
            self.events_result.mark_undone()
            self.stats_result.mark_undone()

    def submit(self, job: Job) -> None:
        self._call(self._begin, job)

    def abort(self, request_id: int) -> None:
        self._call(self._abort, str(request_id))

    def shutdown(self) -> None:
        if not self.is_shut_down:
            self.is_shut_down = True
            self._call(self._stop.set)
            self._thread.join(_CLOSE_S)

    def check_integrity(self) -> None:
        """For tests: the engine's books agree."""
        self._engine.check_integrity()

    def load(self) -> LoadReport:
        """For tests: what the engine holds now."""
        return self._engine.load()

    def _held(self) -> dict[str, Any]:
        """For tests: everything that a request could leave behind. `aborted` counts since the start."""
        load, trouble = self._engine.load(), ""
        try:
            self._engine.check_integrity()
        except AssertionError as exc:
            trouble = str(exc) or "the books do not agree"
        return {
            "active_blocks": load.active_blocks,
            "num_running": load.num_running,
            "num_waiting": load.num_waiting,
            "requests": len(self._jobs),
            "fetches": len(self._fetching),
            "contexts": 0 if self._contexts is None else self._contexts.num_held,
            "trouble": trouble,
            "num_requests": self._num_requests,
            "aborted": dict(self._aborted),
        }

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:  # closed between the two
                log.debug("the executor is gone")

    # --- life ----------------------------------------------------------------------------------

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as exc:
                self._error = exc
                log.debug("the executor ends", exc_info=True)
            finally:
                self._ready.set()

    async def _serve(self) -> None:
        s = self._settings
        engine = self._engine = Engine(
            s.model_dir,
            EngineConfig(
                max_model_len=s.max_seq_len,
                block_size=s.tokens_per_block,
                kv_cache_tokens=s.max_tokens_in_cache,
                max_batch_size=s.max_batch_size,
                max_num_batched_tokens=s.max_num_tokens,
                max_waiting=1 << 30,
                dtype=s.dtype,
                num_threads=_num_threads(),
                host_cache_bytes=s.host_cache_bytes,
            ),
            event_buffer_max_size=s.event_buffer_max_size,
            block_reuse=s.block_reuse,
        )
        await engine.start(self._on_step)
        try:
            if s.transport is not None:
                layout = engine.spec.kv_layout
                assert layout is not None
                self._contexts = _handover.Contexts(engine.kv, layout, s.transport)
                await self._contexts.start()
            books = asyncio.create_task(_books.keep(self._held)) if _books.PATH else None
            self._ready.set()
            await self._stop.wait()
            if books is not None:
                books.cancel()
        finally:
            for task in list(self._fetching.values()):
                task.cancel()
            await asyncio.gather(*self._fetching.values(), return_exceptions=True)
            if self._contexts is not None:
                await self._contexts.close()
            await engine.close()
            for job in self._jobs.values():
                job.fail("the LLM was shut down")

    # --- requests ------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        hangs = _failures.hangs(self._num_requests)
        self._num_requests += 1
        if hangs:
            return
        self._jobs[job.key] = job
        try:
            if job.request_type != "context_and_generation" and self._contexts is None:
                raise ValueError(_NO_TRANSCEIVER)
            if job.cache_salt is not None:
                self._engine.salts[job.key] = job.cache_salt
            if job.request_type == "generation_only":
                self._begin_generation(job)
            else:
                phase = "prefill" if job.request_type == "context_only" else "agg"
                self._engine.submit(
                    EngineRequest(job.key, job.prompt, len(job.prompt), job.sampling(), phase)  # type: ignore[arg-type]
                )
        except (ServingError, ValueError) as exc:
            self._fail(job, str(exc))

    def _begin_generation(self, job: Job) -> None:
        given = job.disaggregated
        state = _handover.unpack(given.opaque_state)
        if state.prompt != _handover.prompt_hash(job.prompt):
            raise ValueError("the prompt is not the one that the context computed")
        if not given.first_gen_tokens:
            raise ValueError("first_gen_tokens are missing")
        task = self._loop.create_task(self._fetch(job, state), name=f"fetch-{job.id}")
        self._fetching[job.key] = task
        task.add_done_callback(lambda _: self._fetching.pop(job.key, None))

    async def _fetch(self, job: Job, state: _handover.State) -> None:
        first = list(job.disaggregated.first_gen_tokens)
        sampling = job.sampling()
        ends_at_once = sampling.max_tokens <= len(first) or first[-1] in sampling.stop_token_ids
        request = EngineRequest(
            job.key,
            job.prompt + first,
            len(job.prompt),
            # Blocks are reserved even for a request that has nothing left to generate.
            _with_room(job, len(first)) if ends_at_once else sampling,
            "decode",
            _handover.as_params(state),
        )
        assert self._contexts is not None
        try:
            async with self._engine.kv.reserve(request) as reservation:
                job.timing.kv_cache_transfer_start = now()
                job.timing.kv_cache_size = await self._contexts.fetch(state, reservation)
                job.timing.kv_cache_transfer_end = now()
                job.begin_with(first, getattr(job.disaggregated, "first_gen_log_probs", None))
                if not ends_at_once:
                    reservation.commit()
        except asyncio.CancelledError:
            raise
        except (ServingError, ValueError) as exc:
            self._fail(job, str(exc))
            return
        if ends_at_once:
            if first[-1] in sampling.stop_token_ids:
                job.stop_with(first[-1], is_pending=True)
            else:
                job.pending.finish_reason = "length"
            self._answer(job)

    def _abort(self, key: str) -> None:
        """Without effect on what is finished: a context that waits to be fetched goes on waiting."""
        job = self._jobs.get(key)
        if job is None:
            self._aborted["finished"] += 1
            return
        self._aborted[job.request_type] += 1
        task = self._fetching.get(key)
        if task is None:
            self._engine.abort(key)
            return
        # The context learns nothing of it and keeps its blocks until its time is over.
        task.cancel()
        del self._jobs[key]
        job.result._inbox.put(Response(finish_reason="cancelled"))

    def _fail(self, job: Job, message: str) -> None:
        self._jobs.pop(job.key, None)
        self._engine.salts.pop(job.key, None)
        job.fail(message)

    # --- the engine's steps --------------------------------------------------------------------

    def _on_step(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            job.add(output)
            if output.finish_reason is not None and job.request_type == "context_only":
                self._end_context(job)
            self._answer(job)
        if self._settings.stats and outputs:
            self._waiting_stats.append(self._stats.of_step(outputs, load))
        self._pass_on()

    def _end_context(self, job: Job) -> None:
        if job.pending.finish_reason == "stop":  # an end id: nothing is kept for anyone
            self._engine.kv.release(job.key)
        if job.pending.finish_reason != "length" or self._contexts is None:
            return
        fields: dict[str, Any] = {
            "request_type": "context_only",
            "first_gen_tokens": list(job.pending.token_ids),
            "ctx_request_id": job.id,
            "opaque_state": self._contexts.hold(job.key, job.prompt, self._settings.timeout_s),
        }
        known = _contract.members("DisaggregatedParams")
        later = {
            "first_gen_log_probs": job.pending.logprobs,
            "disagg_request_id": getattr(job.disaggregated, "disagg_request_id", None),
            "ctx_dp_rank": 0,
        }
        fields |= {name: value for name, value in later.items() if name in known}
        job.pending.disaggregated_params = DisaggregatedParams(**fields)
        # The real one says either; nobody may rely on the first.
        job.pending.finish_reason = "not_finished" if job.id % 2 else "length"

    def _answer(self, job: Job) -> None:
        s = self._settings
        if job.pending.finish_reason is not None or job.pending.error is not None:
            self._jobs.pop(job.key, None)
        wants_metrics = s.perf_metrics or job.params.return_perf_metrics
        job.answer(block_size=s.tokens_per_block, with_metrics=wants_metrics)

    def _pass_on(self) -> None:
        if self.events_result is None or self.stats_result is None:
            return  # until the first request both wait, and the oldest are lost
        if self._engine.kv_events is not None:
            for event in self._engine.kv_events.take():
                self.events_result.put(event)
        while self._waiting_stats:
            self.stats_result.put(self._waiting_stats.popleft())


def _num_threads() -> int:
    """Workers of a test share a machine, and the arguments of an LLM know no threads."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() else max(1, (os.cpu_count() or 1) // 2)


def _with_room(job: Job, num_tokens: int) -> SamplingParams:
    return msgspec.structs.replace(job.sampling(), max_tokens=num_tokens + 1)
