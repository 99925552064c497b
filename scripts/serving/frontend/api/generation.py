"""All sequences of one HTTP request, from the pipeline's outputs to deltas.

`Generation` produces; whoever writes the response takes from its `deltas`. Between the two lies
a buffer that merges what was not taken for long, so a slow client gets fewer and larger chunks and
never slows a worker down.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from time import perf_counter

from msgspec import Struct
from tokenizers import Tokenizer

from serving.errors import EngineFailed
from serving.frontend.api.response import CompletionPlan, Usage
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.protocol import EngineOutput, TokenLogprob
from serving.text.detokenize import Delta, Detokenizer
from serving.text.preprocess import PreparedRequest

MAX_SEPARATE = 256
"""DeltaBuffer of one choice that wait to be written, before they become one."""


class DeltaBuffer:
    """What was generated and not yet taken, of all choices of one response. One taker.

    A bare future wakes the taker, at half the cost of an Event: it happens once per token. Each
    token stays a delta of its own, unless a taker that waits for a slow client leaves more than
    MAX_SEPARATE of them.
    """

    def __init__(self, *, is_whole: bool) -> None:
        self._is_whole = is_whole  # nobody takes before the end
        self._pending: dict[int, list[Delta]] = {}
        self._taker: asyncio.Future[None] | None = None
        self._closed = False
        self._error: Exception | None = None

    def put(self, index: int, *deltas: Delta) -> None:
        pending = self._pending.setdefault(index, [])
        pending += deltas
        if len(pending) > MAX_SEPARATE and not self._is_whole:
            pending[:] = [Delta.merged(pending)]
        if self._taker is not None:
            self._wake()

    def close(self, error: Exception | None = None) -> None:
        """No more will come; `error` is why."""
        self._closed, self._error = True, error
        self._wake()

    async def take(self) -> dict[int, list[Delta]]:
        """Choice to its new texts; waits for some. Empty: that was all.

        Raises the error that ended the generation, once everything before it was taken.
        """
        if not (self._pending or self._closed):
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        pending, self._pending = self._pending, {}
        if not pending and self._error is not None:
            raise self._error
        return pending

    def _wake(self) -> None:
        taker, self._taker = self._taker, None
        if taker is not None and not taker.done():  # done: the taker was cancelled
            taker.set_result(None)

    def all(self) -> dict[int, Delta]:
        """Everything, after `close`. Raises the error that ended the generation."""
        if self._error is not None:
            raise self._error
        return {index: Delta.merged(deltas) for index, deltas in self._pending.items()}


class SampleProgress(Struct):
    """How one sequence is coming along. `ttft_s` counts from the arrival of the HTTP request."""

    prepared: PreparedRequest
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float | None = None
    finish_reason: str | None = None


class Generation:
    """Runs the sequences of a plan. `arrived` is `perf_counter()` at the request's arrival."""

    def __init__(
        self,
        plan: CompletionPlan,
        pipeline: Pipeline,
        tokenizer: Tokenizer,
        metrics: Metrics,
        arrived: float,
    ) -> None:
        self.plan, self.deltas = plan, DeltaBuffer(is_whole=not plan.stream)
        self.sequences = [SampleProgress(prepared) for prepared in plan.samples]
        self._pipeline, self._tokenizer = pipeline, tokenizer
        self._metrics, self._arrived = metrics, arrived

    async def run(self) -> None:
        """Generate everything. Never raises: `deltas` end with the error. Cancelling it aborts.

        One failed sequence fails the response and aborts the others.
        """
        error: Exception | None = None
        try:
            if len(self.sequences) == 1:
                await self._run_sequence(0)
            else:
                async with asyncio.TaskGroup() as tasks:
                    for index in range(len(self.sequences)):
                        tasks.create_task(self._run_sequence(index))
        except ExceptionGroup as group:
            error = group.exceptions[0]
        except Exception as exc:
            error = exc
        finally:
            self.deltas.close(error)

    async def whole(self) -> list[Delta]:
        """Everything at once, choice by choice. Raises what ended the generation."""
        await self.run()
        deltas = self.deltas.all()
        return [deltas[index] for index in range(len(self.sequences))]

    async def _run_sequence(self, index: int) -> None:
        sequence = self.sequences[index]
        prepared, metrics = sequence.prepared, self._metrics
        detokenizer = Detokenizer(self._tokenizer, prepared)
        previous = 0.0
        metrics.queued.value += 1
        try:
            async with aclosing(self._pipeline.generate(prepared)) as outputs:
                async for output in outputs:
                    now = perf_counter()
                    if sequence.ttft_s is None:
                        sequence.ttft_s = now - self._arrived
                        metrics.queued.value -= 1
                        metrics.time_to_first_token.observe(sequence.ttft_s)
                        if self.plan.preludes:
                            entries = _prompt_entries(prepared, output)
                            prelude = Delta(self.plan.preludes[index], logprobs=entries)
                            self.deltas.put(index, prelude)
                    elif output.token_ids:
                        gap_s = (now - previous) / len(output.token_ids)
                        metrics.inter_token_latency.observe(gap_s)
                    previous = now
                    self._take(index, detokenizer, output)
                    if sequence.finish_reason is not None:
                        return
            raise EngineFailed(f"{prepared.request_id} ended without a finish_reason")
        finally:
            if sequence.ttft_s is None:
                metrics.queued.value -= 1
            metrics.prompt_tokens.add(len(prepared.token_ids))
            metrics.completion_tokens.add(sequence.completion_tokens)
            metrics.cached_tokens.add(sequence.cached_tokens)

    def _take(self, index: int, detokenizer: Detokenizer, output: EngineOutput) -> None:
        sequence = self.sequences[index]
        if output.finish_reason in ("error", "cancelled"):
            why = output.error.message if output.error else f"it was {output.finish_reason}"
            raise EngineFailed(f"{sequence.prepared.request_id} was not finished: {why}")
        if output.cached_tokens is not None:
            sequence.cached_tokens = output.cached_tokens
        if sequence.prepared.prompt_only:
            sequence.finish_reason = "length"
            self.deltas.put(index, Delta(finish_reason="length"))
            return
        deltas = detokenizer.feed_each(output)
        sequence.completion_tokens = detokenizer.num_tokens
        sequence.finish_reason = detokenizer.finish_reason
        if deltas:
            self.deltas.put(index, *deltas)

    # --- counts --------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """A prompt counts once, however many samples it got."""
        prompts = self.sequences[:: self.plan.samples_per_prompt]
        return Usage(
            prompt_tokens=sum(len(sequence.prepared.token_ids) for sequence in prompts),
            completion_tokens=sum(sequence.completion_tokens for sequence in self.sequences),
            cached_tokens=sum(sequence.cached_tokens for sequence in prompts),
        )

    def ttft_s(self) -> float | None:
        """Of the first sequence that had a token."""
        return min((s.ttft_s for s in self.sequences if s.ttft_s is not None), default=None)

    def overlap_blocks(self) -> int:
        """Blocks that the router knew to be where the sequences went."""
        return sum(sequence.prepared.trace.overlap_blocks for sequence in self.sequences)

    def instances(self) -> list[str]:
        """All that worked on it, in order."""
        visited = (name for s in self.sequences for name in s.prepared.trace.instances)
        return list(dict.fromkeys(visited))


def _prompt_entries(prepared: PreparedRequest, output: EngineOutput) -> list[TokenLogprob] | None:
    """Of all prompt tokens, if they were asked for."""
    if output.prompt_logprobs is None:
        return None
    return [TokenLogprob(prepared.token_ids[0], None, []), *output.prompt_logprobs]
