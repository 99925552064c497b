"""An engine that computes nothing: real queues, blocks and events, modelled time, made-up text.

Scheduler and block pool are the core that the torch engine uses. `WorkerSpeed` says how long a step
or a transfer takes; meanwhile the event loop is free, so that hundreds of instances fit in a
process and on a core or two. Steps that take no time follow each other by `call_soon`. No KV
moves: a prefill holds its blocks for as long as fetching them takes, and a decode waits that long,
one transfer of an instance after the other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from serving import block_hash
from serving.config import EngineConfig, MockConfig
from serving.engine.base import (
    EngineHealth,
    EngineSpec,
    StepSink,
    TransferringEngine,
    refuse_pooling,
    require_runnable,
)
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.host_tier import HostTier
from serving.engine.core.queue_timer import QueueTimer
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.speed import WorkerSpeed, work_of
from serving.engine.core.step import Chunk, StepPlan
from serving.engine.manifest import EngineManifest
from serving.engine.mock.text import MockText, printable_ids
from serving.errors import EngineFailed, InvalidRequest, OperatorError
from serving.load_report import KvTransferTotals, LoadReport
from serving.protocol import (
    BlocksRemoved,
    BlocksStored,
    EngineOutput,
    EngineRequest,
    KvTransferParams,
    Role,
    Tier,
    TokenLogprob,
)

log = logging.getLogger(__name__)

FULL_BATCH_TOKENS = 8192
"""Tokens of each request of a full batch for which a pool of unstated size has room. Hundreds of
instances may share a process, so that the books of long contexts would take much memory."""
CATCH_UP_S = 0.05
"""Steps that a late timer delayed are made up for, up to this much."""


class MockEngine(TransferringEngine):
    """See the module. `manifest` is that of an engine with dummy weights."""

    must_fetch = False

    def __init__(
        self,
        engine_dir: Path,
        manifest: EngineManifest,
        config: EngineConfig,
        *,
        role: Role,
        instance_id: str,
        timing: MockConfig,
    ) -> None:
        assert manifest.kv_layout is not None, "it was built as for the torch engine"
        self._manifest, self._layout = manifest, manifest.kv_layout
        self._engine_dir, self._instance_id = engine_dir, instance_id
        self._speed = WorkerSpeed.from_mock(timing, self._layout.token_bytes)
        model_limit = manifest.model_max_len
        max_model_len = config.context_tokens(
            min(model_limit, config.kv_cache_tokens or model_limit)
        )
        self._limits = SchedulerLimits.from_config(
            config, config.step_tokens(role=role), max_model_len
        )
        num_tokens = config.kv_cache_tokens or max(
            max_model_len, config.max_batch_size * min(max_model_len, FULL_BATCH_TOKENS)
        )
        if num_tokens < max_model_len:
            raise OperatorError(
                f"`engine.kv_cache_tokens` {num_tokens} cannot hold one request of "
                f"`engine.max_model_len` {max_model_len}",
                remedy="raise `engine.kv_cache_tokens` or lower `engine.max_model_len`",
            )
        self.spec = EngineSpec(
            max_model_len=max_model_len,
            block_size=config.block_size,
            num_blocks=-(-num_tokens // config.block_size),
            max_batch_size=config.max_batch_size,
            hash_salt=manifest.hash_salt,
            fingerprint=manifest.fingerprint,
            kv_layout=None,
            device="cpu",
        )
        tier = HostTier(config.host_cache_bytes // self._layout.block_bytes)
        self._scheduler = Scheduler(BlockPool(self.spec.num_blocks, tier), self._limits)
        self._root = block_hash.root_hash(manifest.hash_salt)
        self._arrivals = itertools.count()
        self._queue_timer = QueueTimer(self._expire)
        self._step: StepPlan | None = None  # under way
        self._next: asyncio.Handle | None = None  # the call that ends it, or begins one
        self._due = 0.0  # when the step under way ends, whenever its timer fires
        self._transfers_end = 0.0  # loop time at which all transfers so far are over
        self._fetches: dict[str, asyncio.Handle] = {}
        self._holds: dict[str, asyncio.Handle] = {}
        self._is_delivering = self._is_closed = False
        self._failure = ""
        # Hashes that the sink knows from events.
        self._delivered: dict[Tier, set[int]] = {"device": set(), "host": set()}
        self._loop: asyncio.AbstractEventLoop
        self._sink: StepSink
        self._text: MockText
        self.transfers = KvTransferTotals(kv_transport="mock")

    # --- life ----------------------------------------------------------------------------------

    async def start(self, sink: StepSink) -> None:
        self._loop, self._sink = asyncio.get_running_loop(), sink
        self._text = MockText(printable_ids(self._engine_dir, self._manifest.vocab_size))

    async def close(self) -> None:
        if self._is_closed or not hasattr(self, "_loop"):
            return
        self._is_closed = True
        self._queue_timer.cancel()
        if self._next is not None:
            self._next.cancel()
        for request_id in self._scheduler.request_ids():
            self._scheduler.abort(request_id)
        for handle in (*self._fetches.values(), *self._holds.values()):
            handle.cancel()
        if self._step is not None:  # its requests are over: this only ends their part in it
            self._scheduler.pool.copied(self._step.copies)
            self._scheduler.fail(self._step.chunks, "closed")
        self._deliver()

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        if self._is_closed or self._failure:
            raise EngineFailed(self._failure or "the engine is closing")
        if request.sampling.guide is not None:
            raise InvalidRequest(
                "the mock engine answers at random and follows no grammar", code="unsupported"
            )
        refuse_pooling(request, "mock")
        require_runnable(request, self._limits.max_model_len, self._manifest.vocab_size)
        params = request.kv_transfer_params
        if params is not None and not self._is_fetchable(request):
            self.transfers.kv_transfer_failures += 1
            self.transfers.local_prefill_fallbacks += 1
            params = None
            request = msgspec.structs.replace(request, kv_transfer_params=None)
        sequence = Sequence(request, next(self._arrivals), self._root, self._limits.block_size)
        prompt = request.token_ids[: request.num_prompt_tokens]
        sequence.seed = self._text.seed(prompt, request.sampling.seed)
        if params is not None:
            sequence.on_settled = lambda: self._settled(sequence)
        self._queue_timer.watch(sequence)
        self._scheduler.add(sequence)
        self._wake()

    def _expire(self, now: float) -> float | None:
        """See `Scheduler.expire`."""
        due = self._scheduler.expire(now)
        self._wake()
        self._deliver_soon()
        return due

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)
        self._free(request_id)

    def release(self, request_id: str) -> None:
        self._scheduler.release_export(request_id)
        self._free(request_id)

    def load(self) -> LoadReport:
        return self._scheduler.load()

    def health(self) -> EngineHealth:
        return EngineHealth(self._failure)

    def snapshot(self, tier: Tier = "device") -> list[int]:
        return list(self._delivered[tier])

    def check_integrity(self) -> None:
        """For tests: every block is free, cached or held, and the books agree."""
        self._scheduler.check_integrity()

    def _free(self, request_id: str) -> None:
        """A request is over, or its blocks are no longer held: others may have waited for them."""
        if (handle := self._holds.pop(request_id, None)) is not None:
            handle.cancel()
        self._wake()
        self._deliver_soon()

    # --- steps ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Begin a step soon, unless one is under way: another step follows that one anyway."""
        if self._next is None and not self._is_closed and not self._failure:
            self._due = self._loop.time()
            self._next = self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._contained(self._begin)
        if self._step is None:  # nothing to compute, yet evictions or admissions may have happened
            self._deliver_soon()

    def _contained(self, part: Callable[[], None]) -> None:
        """Run a part of a step. What it raises means that the bookkeeping failed."""
        try:
            part()
        except Exception as exc:
            log.exception("the engine stops: its bookkeeping failed")
            self._failure = f"{type(exc).__name__}: {exc}"
            self._scheduler.fail_all(self._failure)
            self._deliver_soon()

    def _begin(self) -> None:
        self._next = None
        self._scheduler.admit_reservations()
        plan = self._scheduler.plan_step()
        if not plan:
            return
        host_tokens = len(plan.copies.onloads) * self._layout.block_size
        seconds = self._speed.step_time_s(work_of(plan.chunks), host_tokens)
        self._scheduler.launched(plan.chunks)
        self._step = plan
        if seconds == 0.0:
            self._next = self._loop.call_soon(self._contained, self._end)
        else:
            self._due = max(self._due, self._loop.time() - CATCH_UP_S) + seconds
            self._next = self._loop.call_at(self._due, self._contained, self._end)

    def _end(self) -> None:
        assert self._step is not None, "only a step under way ends"
        plan, self._step = self._step, None
        self._scheduler.pool.copied(plan.copies)
        self._scheduler.complete(plan.chunks, *self._choose(plan.chunks))
        self._begin()
        self._deliver()

    def _choose(self, chunks: list[Chunk]) -> tuple[list[int], list[TokenLogprob | None]]:
        """Tokens of the chunks that sample, and the log-probabilities that requests want."""
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        text = self._text
        for chunk in chunks:
            sequence = chunk.sequence
            if num_reported := chunk.num_reported:
                num_top = sequence.sampling.prompt_logprobs or 0
                reported = sequence.tokens[chunk.start + 1 : chunk.start + 1 + num_reported]
                # From `start` on: a preempted prompt is computed and reported again.
                sequence.prompt_logprobs[chunk.start :] = [
                    text.logprob(token, num_top) for token in reported
                ]
            if chunk.samples:
                token = text.token(sequence.seed, sequence.num_output - sequence.num_unknown)
                num_wanted = sequence.sampling.logprobs
                tokens.append(token)
                logprobs.append(None if num_wanted is None else text.logprob(token, num_wanted))
        return tokens, logprobs

    # --- transfers -----------------------------------------------------------------------------

    def _is_fetchable(self, request: EngineRequest) -> bool:
        params = request.kv_transfer_params
        return (
            isinstance(params, KvTransferParams)
            and params.layout == self._layout.fingerprint
            and params.num_tokens == len(request.token_ids) - 1
        )

    def _settled(self, sequence: Sequence) -> None:
        """A reservation has its blocks, so the transfer begins; or the request is over."""
        request_id = sequence.request_id
        if sequence.state is not State.RESERVED:
            if (handle := self._fetches.pop(request_id, None)) is not None:
                handle.cancel()
            return
        num_blocks = len(sequence.blocks) - sequence.num_stored
        num_bytes = num_blocks * self._layout.block_bytes
        began = self._loop.time()
        seconds = self._speed.transfer_time_s(num_blocks * self._layout.block_size)

        def arrived() -> None:
            del self._fetches[request_id]
            self.transfers.kv_transfers += 1
            self.transfers.kv_bytes_received += num_bytes
            self.transfers.kv_transfer_seconds += self._loop.time() - began
            self._scheduler.commit(sequence)
            self._wake()

        if seconds:
            self._transfers_end = max(self._transfers_end, began) + seconds
        self._fetches[request_id] = self._call_at(self._transfers_end, arrived, is_now=not seconds)

    def _hand_over(self, output: EngineOutput) -> EngineOutput:
        """Add transfer parameters to a finished prefill; hold its blocks as long as the transfer takes."""
        sequence = self._scheduler.exported.get(output.request_id)
        if sequence is None or output.finish_reason not in ("stop", "length"):
            return output
        request, num_blocks = sequence.request, len(sequence.blocks)
        goes_on = self._goes_on(request, output)
        num_tokens = num_blocks * self._layout.block_size if goes_on else 0
        seconds = self._speed.transfer_time_s(num_tokens)
        until = self._loop.time() + seconds
        release = self._call_at(until, lambda: self.release(request.request_id), is_now=not seconds)
        self._holds[request.request_id] = release
        if not goes_on:
            return output
        params = KvTransferParams(
            source_instance=self._instance_id,
            source_epoch=0,
            address="mock",
            request_id=request.request_id,
            nonce="",
            num_tokens=len(request.token_ids),
            num_blocks=num_blocks,
            layout=self._layout.fingerprint,
        )
        return msgspec.structs.replace(output, kv_transfer_params=params)

    def _goes_on(self, request: EngineRequest, output: EngineOutput) -> bool:
        num_tokens = len(request.token_ids) + 1
        return (
            output.finish_reason == "length"
            and num_tokens - request.num_prompt_tokens < request.sampling.max_tokens
            and num_tokens < self._limits.max_model_len
        )

    def _call_at(self, when: float, action: Callable[[], None], *, is_now: bool) -> asyncio.Handle:
        return self._loop.call_soon(action) if is_now else self._loop.call_at(when, action)

    # --- delivery ------------------------------------------------------------------------------

    def _deliver_soon(self) -> None:
        """Not from here: a sink may be what called us."""
        if not self._is_delivering and not self._is_closed:
            self._is_delivering = True
            self._loop.call_soon(self._deliver_now)

    def _deliver_now(self) -> None:
        self._is_delivering = False
        if not self._is_closed:
            self._deliver()

    def _deliver(self) -> None:
        """Give the sink all outputs and events so far, with the load after them."""
        outputs = [
            self._hand_over(output)
            for output in self._scheduler.take_outputs()
            if output.token_ids or output.finish_reason is not None
        ]
        events = self._scheduler.take_events()
        for event in events:
            if isinstance(event, BlocksStored):
                self._delivered[event.tier].update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                self._delivered[event.tier].difference_update(event.block_hashes)
        self._sink(outputs, events, self._scheduler.load())
