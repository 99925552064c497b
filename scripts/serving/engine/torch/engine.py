"""The embedded engine: an event-loop face over one compute thread.

One lock guards all bookkeeping (scheduler, pool, outbox); it is never held while the model
computes, so requests, aborts and reservations take effect while a step runs. Whatever happens
goes into the outbox in order, and the loop delivers it to the sink from there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from serving import block_hash
from serving.engine.base import BlockEngine, EngineSpec, StepSink, require_runnable
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.host_tier import Copies, HostTier
from serving.engine.core.queue_timer import QueueTimer
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence
from serving.engine.core.step import Chunk, StepPlan
from serving.engine.torch.host_blocks import HostBlocks, open_host_blocks
from serving.engine.torch.kv_access import TorchKvBlocks
from serving.engine.torch.model_runner import Launched, ModelRunner
from serving.engine.torch.sampling.guidance import Guides
from serving.errors import EngineFailed, OperatorError
from serving.load_report import LoadReport
from serving.protocol import (
    BlocksRemoved,
    BlocksStored,
    EngineOutput,
    EngineRequest,
    ErrorInfo,
    KvEvent,
    Tier,
)

log = logging.getLogger(__name__)

# A waiting compute thread looks up this often even if nobody woke it.
_IDLE_S = 60.0
# How long `close` waits for the step that is being computed.
_CLOSE_S = 30.0


@dataclass
class _Step:
    """A step under way: copies between the tiers, then what is computed. Either may be nothing."""

    launched: Launched
    copies: Copies
    wait_for_copies: Callable[[], None] = lambda: None


class TorchEngine(BlockEngine):
    """A Hugging Face model with paged KV, continuous batching and a prefix cache."""

    kv: TorchKvBlocks

    def __init__(
        self,
        engine_dir: Path,
        *,
        max_model_len: int,
        block_size: int,
        kv_cache_tokens: int | None,
        max_batch_size: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        device: str = "cpu",
        dtype: str = "float32",
        kv_cache_dtype: str = "auto",
        host_cache_bytes: int = 0,
        num_threads: int | None = None,
        gpu_memory_fraction: float = 0.9,
        hash_salt: str,
        fingerprint: str,
    ) -> None:
        """`kv_cache_tokens` None sizes the pool from free memory; `num_threads` is for CPU,
        `gpu_memory_fraction` for CUDA. `kv_cache_dtype` `auto` keeps KV in `dtype`;
        `host_cache_bytes` 0 means no host tier."""
        self._engine_dir = engine_dir
        self._limits = SchedulerLimits(
            block_size, max_model_len, max_batch_size, max_num_batched_tokens, max_waiting
        )
        self._kv_cache_tokens, self._kv_cache_dtype = kv_cache_tokens, kv_cache_dtype
        self._host_cache_bytes = host_cache_bytes
        self._device, self._dtype, self._num_threads = device, dtype, num_threads
        self._gpu_memory_fraction = gpu_memory_fraction
        self._hash_salt, self._fingerprint = hash_salt, fingerprint
        self._root = block_hash.root_hash(hash_salt)
        self._arrivals = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._closing = False
        self._broken = ""
        self._thread: threading.Thread | None = None
        self._guides = Guides(engine_dir)
        self._queue_timer = QueueTimer(self._expire)
        self._outbox: list[tuple[list[EngineOutput], list[KvEvent]]] = []
        # Hashes, as the sink has been told.
        self._delivered: dict[Tier, set[int]] = {"device": set(), "host": set()}
        self._loop: asyncio.AbstractEventLoop
        self._sink: StepSink
        self._runner: ModelRunner
        self._host: HostBlocks | None = None
        self._scheduler: Scheduler

    # --- life ----------------------------------------------------------------------------------

    async def start(self, sink: StepSink) -> None:
        self._loop, self._sink = asyncio.get_running_loop(), sink
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="torch-engine", daemon=True
        )
        self._thread.start()
        await ready
        layout = self._runner.layout
        self.spec = EngineSpec(
            max_model_len=self._limits.max_model_len,
            block_size=self._limits.block_size,
            num_blocks=self._scheduler.pool.num_blocks,
            max_batch_size=self._limits.max_batch_size,
            hash_salt=self._hash_salt,
            fingerprint=self._fingerprint,
            kv_layout=layout,
            device=self._device,
        )
        self.kv = TorchKvBlocks(self, self._scheduler, self._runner.pool)

    async def close(self) -> None:
        await asyncio.to_thread(self._guides.close)
        if self._thread is None:
            return
        with self._work:
            self._closing = True
            self._work.notify_all()
        self._queue_timer.cancel()
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        if self._thread.is_alive():
            log.error("the compute thread is still busy after %.0f s", _CLOSE_S)
        elif self._host is not None:
            self._host.close()
        self._thread = None
        if hasattr(self, "kv"):
            self.kv.cancel_all()
            self._deliver()

    # --- requests (event loop) -----------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        sequence = self.new_sequence(request)
        with self._work:
            self._scheduler.add(sequence)
            self._work.notify_all()

    def abort(self, request_id: str) -> None:
        self.kv.abort(request_id)

    def load(self) -> LoadReport:
        with self._lock:
            return self._scheduler.load()

    def snapshot(self, tier: Tier = "device") -> list[int]:
        return list(self._delivered[tier])

    def check_integrity(self) -> None:
        """For tests: every block is free, cached or held, and the books agree."""
        with self._lock:
            self._scheduler.check_integrity()

    def new_sequence(self, request: EngineRequest) -> Sequence:
        """Raises InvalidRequest if this engine can never run it, EngineFailed if it is broken."""
        if self._broken or self._closing:
            raise EngineFailed(self._broken or "the engine is closing")
        require_runnable(request, self._limits.max_model_len, self._runner.vocab_size)
        sequence = Sequence(request, next(self._arrivals), self._root, self._limits.block_size)
        self._guides.begin(sequence, lambda: self.on_loop(lambda: self._compiled(sequence)))
        self._queue_timer.watch(sequence)
        return sequence

    def _expire(self, now: float) -> float | None:
        """See `Scheduler.expire`."""
        due: float | None = None

        def expire() -> None:
            nonlocal due
            due = self._scheduler.expire(now)

        self.change(expire)
        return due

    def _compiled(self, sequence: Sequence) -> None:
        """Its grammar is there, or it has none that can be used."""
        guidance = sequence.guidance
        if guidance is not None and guidance.error:
            error = ErrorInfo("InvalidRequest", guidance.error)
            self.change(lambda: self._scheduler.refuse(sequence, error))
            return
        with self._work:
            self._work.notify_all()

    def change(self, action: Callable[[], None]) -> None:
        """Run a change of the books under the lock, let the step loop see it, deliver results."""
        with self._work:
            action()
            self._scheduler.admit_reservations()
            self._post()
            self._work.notify_all()
        # Not delivered from here: a sink may be what called us.
        self._loop.call_soon(self._deliver)

    def locked(self) -> AbstractContextManager[object]:
        """The lock of the books, for a look at them or a change that nobody has to be told."""
        return self._lock

    def on_loop(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the event loop soon; may be called from the compute thread."""
        self._loop.call_soon_threadsafe(callback)

    # --- the compute thread --------------------------------------------------------------------

    def _run(self, ready: asyncio.Future[None]) -> None:
        with torch.inference_mode():
            try:
                self._load()
            except Exception as exc:
                # Whoever awaits `start` decides; this thread has nothing to do any more.
                error = exc
                self.on_loop(lambda: None if ready.done() else ready.set_exception(error))
                return
            self.on_loop(lambda: None if ready.done() else ready.set_result(None))
            try:
                self._run_steps()
            except Exception as exc:
                log.exception("the engine stops: its bookkeeping failed")
                self._break(f"{type(exc).__name__}: {exc}")

    def _load(self) -> None:
        if self._num_threads is not None and self._device == "cpu":
            torch.set_num_threads(self._num_threads)
        limits = self._limits
        runner = self._make_runner()
        if runner.max_positions is not None and limits.max_model_len > runner.max_positions:
            raise OperatorError(
                f"`engine.max_model_len` {limits.max_model_len} is beyond the model's "
                f"{runner.max_positions} positions",
                remedy=f"set engine.max_model_len to {runner.max_positions} or less",
            )
        num_blocks = runner.allocate_pool(self._kv_cache_tokens)
        runner.warm_up(min(limits.max_num_batched_tokens, limits.max_model_len, 64))
        self._runner = runner
        num_tokens = min(limits.max_num_batched_tokens, limits.max_model_len)
        if self._host_cache_bytes:
            self._host = open_host_blocks(runner, self._host_cache_bytes, num_tokens)
        tier = HostTier(self._host.num_blocks if self._host else 0)
        self._scheduler = Scheduler(BlockPool(num_blocks, tier), limits)
        log.info(
            "%s on %s: %s, %d threads, KV pool of %d blocks of %d tokens (%d tokens, %.0f MiB)",
            self._engine_dir.name,
            self._device,
            self._dtype,
            torch.get_num_threads(),
            num_blocks,
            limits.block_size,
            num_blocks * limits.block_size,
            num_blocks * runner.layout.block_bytes / 2**20,
        )

    def _make_runner(self) -> ModelRunner:
        runner, device = self._runner_class(), self._device
        if torch.device(device).type == "cuda":
            # The thread's device: streams and kernels follow it.
            device = f"cuda:{torch.device(device).index or 0}"
            torch.cuda.set_device(torch.device(device))
        limits = self._limits
        return runner(
            self._engine_dir,
            device=device,
            dtype=self._dtype,
            block_size=limits.block_size,
            max_model_len=limits.max_model_len,
            max_batch_size=limits.max_batch_size,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            gpu_memory_fraction=self._gpu_memory_fraction,
            kv_cache_dtype=self._kv_cache_dtype,
        )

    def _runner_class(self) -> type[ModelRunner]:
        if torch.device(self._device).type != "cuda":
            return ModelRunner
        # Triton comes with CUDA builds of torch only.
        from serving.engine.torch.cuda.runner import CudaRunner

        return CudaRunner

    def _run_steps(self) -> None:
        """Launch a step, and while it runs the next one, until the engine closes."""
        under_way: deque[_Step] = deque()
        while (planned := self._next_step(is_ahead=bool(under_way))) is not None:
            step = self._launch(*planned)
            if step is not None:
                under_way.append(step)
            if under_way and (step is None or len(under_way) >= self._runner.depth):
                self._complete(under_way.popleft())
                self.on_loop(self._deliver)
        while under_way:
            self._complete(under_way.popleft())

    def _next_step(self, *, is_ahead: bool) -> StepPlan | None:
        """What to compute next, and to copy before; waits for it unless a step is under way.

        None when closing.
        """
        with self._work:
            while not self._closing:
                plan = self._scheduler.plan_step(is_ahead=is_ahead)
                if plan or is_ahead:
                    return plan
                if self._post():  # nothing to compute, yet evictions or admissions happened
                    self.on_loop(self._deliver)
                self._work.wait(_IDLE_S)
            return None

    def _launch(self, chunks: list[Chunk], copies: Copies) -> _Step | None:
        """None where nothing is under way: nothing was to be done, or it failed at once."""
        step = _Step(Launched([], None), copies)
        if copies:
            # Nobody catches what it raises: blocks that were not copied would be wrong for good.
            assert self._host is not None, "there are no copies without a host tier"
            step.wait_for_copies = self._host.run(copies)
        if chunks:
            try:
                step.launched = self._runner.launch(chunks)
            except Exception as exc:
                self._fail(chunks, exc)
            with self._lock:
                self._scheduler.launched(step.launched.chunks)
        return step if copies or step.launched.chunks else None

    def _complete(self, step: _Step) -> None:
        if step.copies:
            step.wait_for_copies()
            with self._lock:
                self._scheduler.pool.copied(step.copies)
        chunks = step.launched.chunks
        try:
            tokens, logprobs = step.launched.result()
        except Exception as exc:
            self._fail(chunks, exc)
            return
        with self._lock:
            self._scheduler.complete(chunks, tokens, logprobs)
            self._after_step()

    def _fail(self, chunks: list[Chunk], exc: Exception) -> None:
        log.error("a step of %d requests failed", len(chunks), exc_info=exc)
        with self._lock:
            self._scheduler.fail(chunks, f"{type(exc).__name__}: {exc}")
            self._after_step()
        self.on_loop(self._deliver)

    def _break(self, why: str) -> None:
        """Nothing can be computed any more: end all requests and refuse new ones."""
        with self._lock:
            self._broken = why
            self._scheduler.fail_all(why)
            self._post()
        self.on_loop(self._deliver)

    def _after_step(self) -> None:
        self._scheduler.admit_reservations()
        self._post()

    # --- delivery ------------------------------------------------------------------------------

    def _post(self) -> bool:
        """Move what happened into the outbox. Called under the lock."""
        outputs, events = self._scheduler.take_outputs(), self._scheduler.take_events()
        if outputs or events:
            self._outbox.append((outputs, events))
        return bool(outputs or events)

    def _deliver(self) -> None:
        """Hand the outbox to the sink in one call, on the event loop."""
        with self._lock:
            self._post()
            posted, self._outbox = self._outbox, []
            load = self._scheduler.load()
        if self._closing and not posted:
            return  # the last delivery was made by `close`
        outputs = [output for batch, _ in posted for output in batch]
        events = [event for _, batch in posted for event in batch]
        for event in events:
            if isinstance(event, BlocksStored):
                self._delivered[event.tier].update(event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                self._delivered[event.tier].difference_update(event.block_hashes)
        self._sink(outputs, events, load)
