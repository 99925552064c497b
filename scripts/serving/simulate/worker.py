"""A worker as the router sees it: the engine's real block pool, and time by the token.

Prompts are computed one after another, in order of arrival, at a fixed speed. Sequences decode
together: a step takes `itl_s`, and `itl_per_sequence_s` more for each sequence beyond the first,
and gives every sequence one token. The two do not slow each other. A request holds blocks for its prompt
and all it will say from the start of its prefill (or of its transfer) to its end; when they do
not fit it waits, and so do those behind it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial

from msgspec import Struct

from serving.engine.core.block_pool import BlockPool
from serving.load_report import LoadReport
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard, Role
from serving.simulate.clock import Clock
from serving.simulate.trace import TraceRequest

REPORT_EVERY_S = 0.02
"""Load reports come with engine steps, and are this far apart at least."""
REPORT_AT_LEAST_EVERY_S = 1.0


class EngineSpeed(Struct, frozen=True):
    """What one worker can do. A transfer moves a prompt's KV from a prefill to a decode worker."""

    prefill_tokens_per_s: float = 20_000.0
    itl_s: float = 0.02
    itl_per_sequence_s: float = 0.0
    transfer_tokens_per_s: float = 1e6
    transfer_latency_s: float = 0.005


class Job:
    """One request on one worker. `cached_tokens` is known once its prefill began."""

    def __init__(
        self,
        request: TraceRequest,
        *,
        computes: bool,
        decodes: bool,
        on_prefilled: Callable[[], None],
        on_done: Callable[[], None],
    ) -> None:
        self.request, self.computes, self.decodes = request, computes, decodes
        self.on_prefilled, self.on_done = on_prefilled, on_done
        self.cached_tokens = 0
        self.blocks: list[int] = []
        self.queued_tokens = request.prompt_tokens


class SimulatedWorker:
    """One instance. Its events go to `publish_kv` and `publish_load`."""

    def __init__(
        self,
        clock: Clock,
        instance_id: str,
        role: Role,
        card: ModelCard,
        num_blocks: int,
        speed: EngineSpeed,
        *,
        publish_kv: Callable[[KvEventBatch], None],
        publish_load: Callable[[LoadReport], None],
    ) -> None:
        self.info = InstanceInfo(
            instance_id, 1, role, [], "", card, num_blocks, 1 << 20, 0, "simulated"
        )
        self.pool = BlockPool(num_blocks)
        self.seq = 0
        self.busy_s = 0.0
        """Time spent with prompts so far."""
        self._clock, self._speed, self._block_size = clock, speed, card.block_size
        self._publish_kv, self._publish_load = publish_kv, publish_load
        self._waiting: deque[Job] = deque()
        self._computing: Job | None = None
        self._computed_at_s = 0.0
        self._batch = _Batch(clock, speed)
        self._report_due = False
        self._reported_at_s = -REPORT_EVERY_S
        self._is_stopped = False
        self._keep_reporting()

    # --- requests -------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """A request has arrived."""
        cached = len(self.pool.match(job.request.block_hashes)) * self._block_size
        job.queued_tokens = max(1, job.request.prompt_tokens - cached) if job.computes else 0
        self._waiting.append(job)
        self._go_on()

    def release(self, job: Job) -> None:
        """A decode worker has fetched what a prefill held."""
        self._free(job)
        self._go_on()

    def stop(self) -> None:
        """No more reports."""
        self._is_stopped = True

    def _go_on(self) -> None:
        """Start what can be started, in order."""
        while self._waiting and self._computing is None:
            job = self._waiting[0]
            if not self._take_blocks(job):
                break
            self._waiting.popleft()
            request = job.request
            if job.computes:
                work = max(1, request.prompt_tokens - job.cached_tokens)
                took_s = work / self._speed.prefill_tokens_per_s
                self._computing, self.busy_s = job, self.busy_s + took_s
            else:
                missing = request.prompt_tokens - job.cached_tokens
                took_s = (
                    self._speed.transfer_latency_s + missing / self._speed.transfer_tokens_per_s
                )
            self._computed_at_s = self._clock.now_s + took_s
            self._clock.after(took_s, partial(self._prefilled, job))
        self._told()

    def _take_blocks(self, job: Job) -> bool:
        """Hold what is cached, and room for the rest; a request larger than the pool takes it all."""
        request = job.request
        tokens = request.prompt_tokens + (request.completion_tokens if job.decodes else 0)
        wanted = min(-(-tokens // self._block_size), self.pool.num_blocks)
        # The last token is always computed: its logits are needed.
        usable = min((request.prompt_tokens - 1) // self._block_size, wanted)
        matched = self.pool.match(request.block_hashes[:usable])
        if not self.pool.fits(matched, wanted - len(matched)):
            return False
        self.pool.hold(matched)
        job.blocks = matched + self.pool.allocate(wanted - len(matched))
        job.cached_tokens = len(matched) * self._block_size
        return True

    def _prefilled(self, job: Job) -> None:
        hashes = job.request.block_hashes[: len(job.blocks)]
        matched = job.cached_tokens // self._block_size
        stored = self.pool.store(
            job.blocks[matched : len(hashes)],
            hashes[matched:],
            hashes[matched - 1] if matched else None,
        )
        job.blocks[matched : len(hashes)] = stored
        if job.computes:
            self._computing = None
        job.on_prefilled()
        if not job.decodes:
            self._go_on()  # Its blocks are held until they are fetched.
            return
        self._batch.add(job.request.completion_tokens - 1, lambda: self._done(job))
        self._go_on()

    def _done(self, job: Job) -> None:
        self._free(job)
        job.on_done()
        self._go_on()

    def _free(self, job: Job) -> None:
        self.pool.release(job.blocks)
        job.blocks = []

    # --- what it tells --------------------------------------------------------------------------

    def _told(self) -> None:
        events = self.pool.take_events()
        if events:
            self.seq += 1
            self._publish_kv(KvEventBatch(self.info.instance_id, 1, self.seq, events))
        if not self._report_due:
            self._report_due = True
            self._clock.at(self._reported_at_s + REPORT_EVERY_S, self._report)

    def _report(self) -> None:
        self._report_due = False
        self._reported_at_s = now_s = self._clock.now_s
        rest_s = max(0.0, self._computed_at_s - now_s) if self._computing else 0.0
        queued = sum(job.queued_tokens for job in self._waiting)
        self._publish_load(
            LoadReport(
                self.info.instance_id,
                1,
                len(self._batch) + (self._computing is not None),
                len(self._waiting),
                queued + int(rest_s * self._speed.prefill_tokens_per_s),
                self.pool.num_held,
                self.pool.num_cached,
                self.pool.num_blocks,
            )
        )

    def _keep_reporting(self) -> None:
        if not self._is_stopped:
            if self._clock.now_s - self._reported_at_s >= REPORT_AT_LEAST_EVERY_S:
                self._report()
            self._clock.after(REPORT_AT_LEAST_EVERY_S, self._keep_reporting)


class _Batch:
    """Sequences that decode together, each as fast as the others.

    Counts the steps made since the start instead of each sequence's tokens: who joins at step n
    with m tokens to go is done at step n + m.
    """

    def __init__(self, clock: Clock, speed: EngineSpeed) -> None:
        self._clock, self._speed = clock, speed
        self._ends: list[tuple[float, int, Callable[[], None]]] = []
        self._steps, self._counted_at_s = 0.0, 0.0
        self._version = 0

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, num_tokens: int, on_done: Callable[[], None]) -> None:
        self._count()
        self._version += 1
        heapq.heappush(self._ends, (self._steps + num_tokens, self._version, on_done))
        self._expect()

    def _count(self) -> None:
        if self._ends:
            self._steps += (self._clock.now_s - self._counted_at_s) / self._step_s()
        self._counted_at_s = self._clock.now_s

    def _step_s(self) -> float:
        return self._speed.itl_s + self._speed.itl_per_sequence_s * (len(self._ends) - 1)

    def _expect(self) -> None:
        if self._ends:
            version = self._version
            left_s = max(0.0, self._ends[0][0] - self._steps) * self._step_s()
            self._clock.after(left_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version != self._version:
            return  # Somebody joined meanwhile, and the end was put off.
        self._count()
        end, _, on_done = heapq.heappop(self._ends)
        self._steps = max(self._steps, end)
        self._version += 1
        self._expect()
        on_done()
