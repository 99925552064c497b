"""The embedded engine: an event-loop face over one compute thread.

The thread loads the model and runs `StepLoop`; both sides meet in `SharedScheduler`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from pathlib import Path

import torch

from serving import block_hash
from serving.config import EngineConfig
from serving.engine.base import (
    BlockEngine,
    EngineHealth,
    EngineSpec,
    StepSink,
    require_runnable,
)
from serving.engine.core.admission import SchedulerLimits
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.host_tier import HostTier
from serving.engine.core.queue_timer import QueueTimer
from serving.engine.core.scheduler import Scheduler
from serving.engine.core.sequence import Sequence
from serving.engine.torch.kv.access import TorchKvBlocks
from serving.engine.torch.kv.host_blocks import HostBlocks, open_host_blocks
from serving.engine.torch.runner import ModelRunner
from serving.engine.torch.sampling.guidance import Guides
from serving.engine.torch.shared_scheduler import SharedScheduler
from serving.engine.torch.step_loop import StepLoop
from serving.errors import EngineFailed, OperatorError
from serving.load_report import LoadReport
from serving.protocol import EngineRequest, Role, Tier

log = logging.getLogger(__name__)

# How long `close` waits for the step that is being computed.
_CLOSE_S = 30.0


class TorchEngine(BlockEngine):
    """A Hugging Face model with paged KV, continuous batching and a prefix cache."""

    kv: TorchKvBlocks

    def __init__(
        self,
        engine_dir: Path,
        config: EngineConfig,
        device: str,
        *,
        role: Role = "agg",
        hash_salt: str,
        fingerprint: str,
        runner_class: type[ModelRunner] | None = None,
        num_local_workers: int = 1,
    ) -> None:
        """`config.dtype` is resolved; `device` is torch's name of one, which overrides the config's.

        `hash_salt` and `fingerprint` are the built engine's. `runner_class` None: by `device`.
        `num_local_workers` share this host's memory.
        """
        assert config.dtype != "auto", "dtype must be resolved before an engine is started"
        self._engine_dir, self._config, self._device = engine_dir, config, device
        self._hash_salt, self._fingerprint = hash_salt, fingerprint
        self._runner_class = runner_class
        self._num_local_workers = num_local_workers
        self._step_tokens = config.step_tokens(device, role)
        self._limits: SchedulerLimits  # known with the pool
        self._root = block_hash.root_hash(hash_salt)
        self._arrivals = itertools.count()
        self._thread: threading.Thread | None = None
        self._guides = Guides(engine_dir)
        self._shared = SharedScheduler()
        self._queue_timer = QueueTimer(self._shared.expire)
        self._runner: ModelRunner
        self._step_loop: StepLoop
        self._host: HostBlocks | None = None

    # --- life ----------------------------------------------------------------------------------

    async def start(self, sink: StepSink) -> None:
        self._shared.connect(sink)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="torch-engine", daemon=True
        )
        guides = self._guides.load()
        self._thread.start()
        await ready
        await asyncio.wrap_future(guides)
        scheduler = self._shared.scheduler
        self.spec = EngineSpec(
            max_model_len=self._limits.max_model_len,
            block_size=self._limits.block_size,
            num_blocks=scheduler.pool.num_blocks,
            max_batch_size=self._limits.max_batch_size,
            hash_salt=self._hash_salt,
            fingerprint=self._fingerprint,
            kv_layout=self._runner.layout,
            device=self._device,
        )
        self.kv = TorchKvBlocks(self.new_sequence, self._shared, self._runner.pool)

    async def close(self) -> None:
        await asyncio.to_thread(self._guides.close)
        if self._thread is None:
            return
        self._shared.close()
        self._queue_timer.cancel()
        await asyncio.to_thread(self._thread.join, _CLOSE_S)
        if self._thread.is_alive():
            log.error("the compute thread is still busy after %.0f s", _CLOSE_S)
        elif self._host is not None:
            self._host.close()
        self._thread = None
        if hasattr(self, "kv"):
            self.kv.cancel_all()
            self._shared.deliver()

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        self._shared.add(self.new_sequence(request))

    def abort(self, request_id: str) -> None:
        self.kv.abort(request_id)

    def load(self) -> LoadReport:
        return self._shared.load()

    def health(self) -> EngineHealth:
        return EngineHealth(self._shared.failure, self._step_loop.clock.late_s())

    def snapshot(self, tier: Tier = "device") -> list[int]:
        return self._shared.snapshot(tier)

    def check_integrity(self) -> None:
        """For tests: every block is free, cached or held, and the books agree."""
        self._shared.check_integrity()

    def new_sequence(self, request: EngineRequest) -> Sequence:
        """Raises InvalidRequest if this engine can never run it, EngineFailed if it is broken."""
        if refusal := self._shared.refusal:
            raise EngineFailed(refusal)
        require_runnable(request, self._limits.max_model_len, self._runner.vocab_size)
        sequence = Sequence(request, next(self._arrivals), self._root, self._limits.block_size)
        self._guides.begin(
            sequence, lambda: self._shared.on_loop(lambda: self._on_compiled(sequence))
        )
        self._queue_timer.watch(sequence)
        return sequence

    def _on_compiled(self, sequence: Sequence) -> None:
        """Its grammar is compiled, or cannot be used."""
        guidance = sequence.guidance
        if guidance is not None and (error := guidance.error):
            self._shared.change(lambda: self._shared.scheduler.refuse(sequence, error))
        else:
            self._shared.wake()

    # --- the compute thread --------------------------------------------------------------------

    def _run(self, ready: asyncio.Future[None]) -> None:
        shared = self._shared
        with torch.inference_mode():
            try:
                self._load()
            except Exception as exc:
                # Whoever awaits `start` decides; this thread has nothing to do any more.
                error = exc
                shared.on_loop(lambda: None if ready.done() else ready.set_exception(error))
                return
            shared.on_loop(lambda: None if ready.done() else ready.set_result(None))
            try:
                self._step_loop.run()
            except Exception as exc:
                log.exception("the engine stops: its bookkeeping failed")
                shared.fail_all(f"{type(exc).__name__}: {exc}")

    def _load(self) -> None:
        config = self._config
        if config.num_threads is not None and self._device == "cpu":
            torch.set_num_threads(config.num_threads)
        runner = self._make_runner()
        positions = runner.max_positions
        if positions is not None and config.context_tokens(positions) > positions:
            raise OperatorError(
                f"`engine.max_model_len` {config.max_model_len} is beyond the model's {positions} "
                "positions",
                remedy=f"set engine.max_model_len to {positions} or less",
            )
        num_blocks = runner.allocate_pool(self._num_local_workers)
        limits = SchedulerLimits.from_config(config, self._step_tokens, runner.max_model_len)
        self._limits = limits
        num_tokens = min(limits.max_num_batched_tokens, limits.max_model_len)
        runner.warm_up(min(num_tokens, 64))
        self._runner = runner
        if config.host_cache_bytes:
            self._host = open_host_blocks(runner, config.host_cache_bytes, num_tokens)
        tier = HostTier(self._host.num_blocks if self._host else 0)
        self._shared.scheduler = self._make_scheduler(BlockPool(num_blocks, tier))
        self._step_loop = StepLoop(self._shared, runner, self._host)
        log.info(
            "%s on %s: %s, %d threads, context of %d tokens, KV pool of %d blocks of %d tokens "
            "(%d tokens, %.0f MiB)",
            self._engine_dir.name,
            self._device,
            config.dtype,
            torch.get_num_threads(),
            limits.max_model_len,
            num_blocks,
            limits.block_size,
            num_blocks * limits.block_size,
            num_blocks * runner.layout.block_bytes / 2**20,
        )

    def _make_scheduler(self, pool: BlockPool) -> Scheduler:
        return Scheduler(pool, self._limits)

    def _make_runner(self) -> ModelRunner:
        runner_class, device = self._runner_class, self._device
        if torch.device(device).type == "cuda":
            # The thread's device: streams and kernels follow it.
            device = f"cuda:{torch.device(device).index or 0}"
            torch.cuda.set_device(torch.device(device))
            if runner_class is None:
                # Triton comes with CUDA builds of torch only.
                from serving.engine.torch.cuda.runner import CudaRunner

                runner_class = CudaRunner
        return (runner_class or ModelRunner)(
            self._engine_dir, self._config, device, self._step_tokens
        )
