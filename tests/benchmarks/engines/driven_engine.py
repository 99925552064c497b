"""The torch engine behind its public interface, with a clock at its sink."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from serving.config import EngineConfig
from serving.engine.manifest import load_manifest
from serving.engine.torch.engine import TorchEngine
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent, SamplingParams

BLOCK_SIZE = 16
STALLED_S = 60.0
Prompt = int | list[int]


class Run:
    """A batch of requests, submitted together; times are in seconds since then."""

    def __init__(
        self, request_ids: Sequence[str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.request_ids = list(request_ids)
        self._ids = set(request_ids)
        self._clock = clock
        self.started = clock()
        self.finished: set[str] = set()
        self._tokens: Counter[str] = Counter()
        self._steady: list[float] = []
        self._previous: float | None = None  # when all had got a token of the same step
        self._first_s: dict[str, float] = {}
        self._last_s = 0.0
        self._failure = ""
        self._progress = asyncio.Event()

    @property
    def ttft_s(self) -> float:
        """Until all of them had their first token."""
        return max(self._first_s.values())

    @property
    def wall_s(self) -> float:
        """Until the last one was finished."""
        return self._last_s

    def steady_steps(self) -> list[float]:
        """How long each step took that gave every request a token, and followed another such."""
        return self._steady

    async def steady(self, count: int) -> None:
        """Wait for that many more steady steps."""
        target = len(self._steady) + count
        await self._until(lambda: len(self._steady) >= target)
        if len(self._steady) < target:
            raise RuntimeError(f"requests ended after {len(self._steady)} steady steps")

    async def done(self) -> None:
        await self._until(lambda: False)

    async def _until(self, condition: Any) -> None:
        while not condition() and len(self.finished) < len(self.request_ids):
            self._progress.clear()
            async with asyncio.timeout(STALLED_S):
                await self._progress.wait()
            if self._failure:
                raise RuntimeError(self._failure)

    def receive(self, outputs: list[EngineOutput]) -> None:
        """What the engine's sink was given."""
        # Requests of an earlier run that was ended may still have something to say.
        outputs = [output for output in outputs if output.request_id in self._ids]
        if not outputs:
            return
        now = self._clock()
        self._last_s = now - self.started
        for output in outputs:
            if output.finish_reason in ("error", "cancelled"):
                self._failure = f"{output.request_id}: {output.error or output.finish_reason}"
            self._first_s.setdefault(output.request_id, self._last_s)
            self._tokens[output.request_id] += len(output.token_ids)
        got = Counter(o.request_id for o in outputs for _ in o.token_ids)
        # A delivery may bring several steps at once, but then all of them for everybody.
        num_steps = min(got.values(), default=0)
        if self.finished or len(got) < len(self.request_ids) or max(got.values()) != num_steps:
            self._previous = None
        else:
            if self._previous is not None:
                self._steady += [(now - self._previous) / num_steps] * num_steps
            self._previous = now
        self.finished |= {o.request_id for o in outputs if o.finish_reason is not None}
        self._progress.set()


class DrivenEngine:
    """An engine of the built `engine_dir` on `device`; `settings` are those of `EngineConfig`."""

    def __init__(self, engine_dir: Path, device: str, **settings: Any) -> None:
        manifest = load_manifest(engine_dir)
        self._engine = TorchEngine(
            engine_dir,
            EngineConfig(block_size=BLOCK_SIZE, max_waiting=1024, **settings),
            device,
            hash_salt=manifest.hash_salt,
            fingerprint=manifest.fingerprint,
        )
        self._vocab_size = manifest.vocab_size
        self._random = random.Random(0)
        self._num_requests = 0
        self._run: Run | None = None

    async def start(self) -> None:
        await self._engine.start(self._receive)

    async def close(self) -> None:
        await self._engine.close()

    def fresh_prompt(self, num_tokens: int) -> list[int]:
        """Random token ids: no prompt is ever seen twice, so no prefix cache helps."""
        return [self._random.randrange(3, self._vocab_size) for _ in range(num_tokens)]

    async def run(self, prompts: Sequence[Prompt], num_tokens: int) -> Run:
        """Generate `num_tokens` for each prompt (an `int` is the length of a fresh one)."""
        async with self.running(prompts, num_tokens) as run:
            await run.done()
        return run

    @asynccontextmanager
    async def running(self, prompts: Sequence[Prompt], num_tokens: int) -> AsyncIterator[Run]:
        """The same while it goes on; what is not finished at the end is aborted."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0)
        requests = []
        for prompt in prompts:
            tokens = self.fresh_prompt(prompt) if isinstance(prompt, int) else prompt
            self._num_requests += 1
            requests.append(EngineRequest(str(self._num_requests), tokens, len(tokens), sampling))
        self._run = run = Run([request.request_id for request in requests])
        for request in requests:
            self._engine.submit(request)
        try:
            yield run
        finally:
            self._run = None
            for request_id in set(run.request_ids) - run.finished:
                self._engine.abort(request_id)
            async with asyncio.timeout(STALLED_S):
                # An engine offers no event for it.
                while self._engine.load().num_running:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)

    def _receive(
        self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport
    ) -> None:
        del events, load
        if self._run is not None and outputs:
            self._run.receive(outputs)
