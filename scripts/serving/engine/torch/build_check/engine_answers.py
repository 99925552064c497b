"""Run the torch engine at build: every way in which KV comes to be, and what it answers.

Knows the ways (chunked prefill of a batch, a prefix hit, KV from another engine); does not know
what the answers should be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from serving.config import EngineConfig
from serving.errors import ModelError
from serving.load_report import LoadReport
from serving.protocol import EngineOutput, EngineRequest, KvEvent, Phase, SamplingParams

if TYPE_CHECKING:
    from serving.engine.torch.runner import ModelRunner

BLOCK_SIZE: Literal[8] = 8
CHUNK = 32
REMEDY = (
    "use `engine.backend: tensorrt_llm` on GPUs, another checkpoint of the model, or another model"
)


class Case(Struct, frozen=True):
    """A prompt, and how many tokens to choose after it. `name` is for messages."""

    name: str
    prompt: list[int]
    num_tokens: int


@dataclass
class EngineAnswer:
    """Greedy `tokens`, and the log-probability that the engine reports for each."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached_tokens: int = 0


def answer(
    folder: Path,
    dtype: str,
    device: str,
    together: Sequence[Case],
    after: Sequence[Case] = (),
    exported: Sequence[Case] = (),
    runner_class: type[ModelRunner] | None = None,
    chunk: int = CHUNK,
) -> dict[str, EngineAnswer]:
    """The engine's answers by the names of the cases.

    Cases of `together` are computed in one batch. Those of `after` follow one by one and may find
    their prefixes in the cache. Prompts of `exported` are computed by this engine and continued by
    a second one. `runner_class` None: by `device`. A step
    computes `chunk` tokens at most. Raises ModelError when the engine cannot load or compute the model.
    """

    async def run() -> dict[str, EngineAnswer]:
        cases = [*together, *after, *exported]
        runs = [
            _Run(folder, dtype, device, cases, runner_class, chunk)
            for _ in range(2 if exported else 1)
        ]
        try:
            for each in runs:
                await each.start()
            await runs[0].finish(*together)
            for case in after:
                await runs[0].finish(case)
            for case in exported:
                await _hand_over(case, *runs)
        finally:
            for each in runs:
                await each.engine.close()
        return runs[0].answers

    # The caller may have an event loop of its own.
    with ThreadPoolExecutor(1, thread_name_prefix="build-check") as thread:
        return thread.submit(asyncio.run, run()).result()


class _Run:
    """An engine, and everything that it delivered."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str,
        cases: Sequence[Case],
        runner_class: type[ModelRunner] | None,
        chunk: int,
    ) -> None:
        from serving.engine.torch.engine import TorchEngine

        lengths = [len(case.prompt) + case.num_tokens + BLOCK_SIZE for case in cases]
        config = EngineConfig(
            dtype=dtype,  # type: ignore[arg-type]  # one of its literals
            block_size=BLOCK_SIZE,
            max_model_len=max(lengths),
            kv_cache_tokens=sum(lengths) + 2 * BLOCK_SIZE,
            max_batch_size=4,
            max_num_batched_tokens=chunk,
        )
        self.engine = TorchEngine(
            folder,
            config,
            device,
            hash_salt="check",
            fingerprint="check",
            runner_class=runner_class,
        )
        self.answers: dict[str, EngineAnswer] = {}
        self._ended: set[str] = set()
        self._error = ""
        self._delivery = asyncio.Event()

    async def start(self) -> None:
        await self.engine.start(self._take)

    async def finish(self, *cases: Case) -> None:
        """Compute `cases` together. Raises ModelError, or OutOfMemoryError, when a step fails."""
        for case in cases:
            self.engine.submit(request_for(case))
        await self.ended(*cases)

    async def ended(self, *cases: Case) -> None:
        while not self._ended >= {case.name for case in cases}:
            self._delivery.clear()
            await self._delivery.wait()
        if "out of memory" in self._error:
            import torch

            raise torch.OutOfMemoryError(self._error)
        if self._error:
            raise ModelError(
                f"the torch engine cannot compute this model: {self._error}", remedy=REMEDY
            )

    def _take(self, outputs: list[EngineOutput], events: list[KvEvent], load: LoadReport) -> None:
        for output in outputs:
            if output.error is not None:
                self._error = f"{output.error.kind}: {output.error.message}"
            kept = self.answers.setdefault(output.request_id, EngineAnswer())
            kept.tokens += output.token_ids
            kept.logprobs += [entry.logprob or 0.0 for entry in output.logprobs or []]
            kept.cached_tokens += output.cached_tokens or 0
            if output.finish_reason is not None:
                self._ended.add(output.request_id)
        self._delivery.set()


def request_for(case: Case, phase: Phase = "agg", generated: Sequence[int] = ()) -> EngineRequest:
    sampling = SamplingParams(max_tokens=case.num_tokens, temperature=0, logprobs=0)
    tokens = [*case.prompt, *generated]
    return EngineRequest(case.name, tokens, len(case.prompt), sampling, phase)


async def _hand_over(case: Case, source: _Run, target: _Run) -> None:
    """Prefill on `source`, decode on `target`; the whole answer is left with `source`."""
    source.engine.submit(request_for(case, "prefill"))
    await source.ended(case)
    layout = source.engine.spec.kv_layout
    assert layout is not None, "this project moves the torch engine's blocks"
    kv = bytearray(source.engine.kv.exported(case.name) * layout.block_bytes)
    await asyncio.to_thread(source.engine.kv.read, case.name, 0, kv)
    source.engine.kv.release(case.name)
    begun = source.answers[case.name]
    async with target.engine.kv.reserve(request_for(case, "decode", begun.tokens)) as reservation:
        first = reservation.first_block * layout.block_bytes
        await asyncio.to_thread(reservation.write, reservation.first_block, memoryview(kv)[first:])
        reservation.commit()
    await target.ended(case)
    begun.tokens += target.answers[case.name].tokens
    begun.logprobs += target.answers[case.name].logprobs
