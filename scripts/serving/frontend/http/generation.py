"""All samples of one HTTP request, from the pipeline's outputs to deltas of text.

`Generation` produces into its `deltas`. The code that writes the response takes from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter

import msgspec
from msgspec import Struct

from serving.errors import EngineFailed
from serving.frontend.api.plan import CompletionPlan
from serving.frontend.api.writer import Usage
from serving.frontend.http.delta_buffer import DeltaBuffer
from serving.frontend.metrics.registry import Metrics
from serving.frontend.pipeline import Pipeline
from serving.protocol import EngineOutput, TokenLogprob
from serving.text.answer_parser import AnswerParser
from serving.text.conversation import AnswerPlan
from serving.text.detokenize import Delta, Detokenizer
from serving.text.preprocess import PreparedRequest
from serving.text.token_text import TokenText


class SampleProgress(Struct):
    """One sample so far. `ttft_s` counts from the arrival of the HTTP request."""

    prepared: PreparedRequest
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    ttft_s: float | None = None
    finish_reason: str | None = None


class Generation:
    """Runs all samples of a plan. `arrived` is `perf_counter()` at the request's arrival."""

    def __init__(
        self,
        plan: CompletionPlan,
        pipeline: Pipeline,
        tokens: TokenText,
        metrics: Metrics,
        arrived: float,
    ) -> None:
        self.plan, self.deltas = plan, DeltaBuffer(is_whole=not plan.stream)
        self.samples = [SampleProgress(prepared) for prepared in plan.samples]
        self._pipeline, self._tokens = pipeline, tokens
        self._metrics, self._arrived = metrics, arrived
        plan.writer.follow(self.usage)

    async def run(self) -> None:
        """Generate everything. Cancelling it aborts the samples on their workers.

        Never raises: an error ends `deltas`. One failed sample fails the response and aborts the
        others.
        """
        error: Exception | None = None
        try:
            if len(self.samples) == 1:
                await self._run_sample(0)
            else:
                async with asyncio.TaskGroup() as tasks:
                    for index in range(len(self.samples)):
                        tasks.create_task(self._run_sample(index))
        except ExceptionGroup as group:
            error = group.exceptions[0]
        except Exception as exc:
            error = exc
        finally:
            self.deltas.close(error)

    async def whole(self) -> list[Delta]:
        """All choices at once, when they are complete. Raises the error that ended them."""
        await self.run()
        deltas = self.deltas.take_all()
        return [deltas[index] for index in range(len(self.samples))]

    async def _run_sample(self, index: int) -> None:
        sample = self.samples[index]
        prepared, metrics = sample.prepared, self._metrics
        detokenizer = Detokenizer(self._tokens, prepared)
        answer = prepared.answer
        parser = answer.parser() if answer is not None and answer.needs_parser else None
        previous = 0.0
        metrics.queued.value += 1
        try:
            async with aclosing(self._outputs(prepared, parser, sample)) as outputs:
                async for output in outputs:
                    now = perf_counter()
                    if sample.ttft_s is None:
                        sample.ttft_s = now - self._arrived
                        metrics.queued.value -= 1
                        metrics.time_to_first_token.observe(sample.ttft_s)
                        if self.plan.preludes:
                            entries = _prompt_entries(prepared, output)
                            prelude = Delta(self.plan.preludes[index], logprobs=entries)
                            self.deltas.put(index, prelude)
                    elif output.token_ids:
                        gap_s = (now - previous) / len(output.token_ids)
                        metrics.inter_token_latency.observe(gap_s)
                    previous = now
                    self._take(index, detokenizer, parser, output)
                    if sample.finish_reason is not None:
                        return
            raise EngineFailed(f"{prepared.request_id} ended without a finish_reason")
        finally:
            if sample.ttft_s is None:
                metrics.queued.value -= 1
            metrics.prompt_tokens.add(len(prepared.token_ids))
            metrics.completion_tokens.add(sample.completion_tokens)
            metrics.cached_tokens.add(sample.cached_tokens)

    def _outputs(
        self, prepared: PreparedRequest, parser: AnswerParser | None, sample: SampleProgress
    ) -> AsyncGenerator[EngineOutput, None]:
        answer = prepared.answer
        if parser is None or answer is None or answer.reasoning_budget is None:
            return self._pipeline.generate(prepared)
        return self._within_budget(prepared, answer, parser, sample)

    async def _within_budget(
        self,
        prepared: PreparedRequest,
        answer: AnswerPlan,
        parser: AnswerParser,
        sample: SampleProgress,
    ) -> AsyncGenerator[EngineOutput, None]:
        """The pipeline's outputs. Reasoning that uses up its budget is ended, and the answer begun.

        The engine need not know: what was generated, and the end of the reasoning, become the
        beginning of a second request, whose blocks are cached.
        """
        budget = answer.reasoning_budget or 0
        generated: list[int] = []
        async with aclosing(self._pipeline.generate(prepared)) as outputs:
            async for output in outputs:
                generated += output.token_ids
                yield output
                if parser.is_reasoning and sample.reasoning_tokens >= budget:
                    break
        if sample.finish_reason is not None:
            return
        forced = answer.reasoning_end_ids
        left = prepared.sampling.max_tokens - len(generated) - len(forced)
        yield EngineOutput(prepared.request_id, list(forced), "length" if left < 1 else None)
        if left < 1:
            return
        rest = msgspec.structs.replace(
            prepared,
            request_id=f"{prepared.request_id}-answer",
            token_ids=[*prepared.token_ids, *generated, *forced],
            sampling=msgspec.structs.replace(prepared.sampling, max_tokens=left),
            num_generated=len(generated) + len(forced),
        )
        async with aclosing(self._pipeline.generate(rest)) as outputs:
            async for output in outputs:
                yield msgspec.structs.replace(output, cached_tokens=None)

    def _take(
        self,
        index: int,
        detokenizer: Detokenizer,
        parser: AnswerParser | None,
        output: EngineOutput,
    ) -> None:
        sample = self.samples[index]
        if output.finish_reason in ("error", "cancelled"):
            why = output.error.message if output.error else f"it was {output.finish_reason}"
            raise EngineFailed(f"{sample.prepared.request_id} was not finished: {why}")
        if output.cached_tokens is not None:
            sample.cached_tokens = output.cached_tokens
        if sample.prepared.prompt_only:
            sample.finish_reason = "length"
            self.deltas.put(index, Delta(finish_reason="length"))
            return
        deltas = detokenizer.feed_each(output)
        sample.completion_tokens = detokenizer.num_tokens
        sample.finish_reason = detokenizer.finish_reason
        if parser is not None:
            was_reasoning = parser.is_reasoning
            deltas = _parsed(deltas, parser)
            if was_reasoning or parser.is_reasoning:
                sample.reasoning_tokens += len(output.token_ids)
        if sample.prepared.return_token_ids and output.token_ids:
            deltas = [Delta(token_ids=list(output.token_ids)), *deltas]
        if deltas:
            self.deltas.put(index, *deltas)

    # --- counts --------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Token counts. A prompt counts once, however many samples share it."""
        prompts = self.samples[:: self.plan.samples_per_prompt]
        return Usage(
            prompt_tokens=sum(len(sample.prepared.token_ids) for sample in prompts),
            completion_tokens=sum(sample.completion_tokens for sample in self.samples),
            cached_tokens=sum(sample.cached_tokens for sample in prompts),
            reasoning_tokens=sum(sample.reasoning_tokens for sample in self.samples),
        )

    def ttft_s(self) -> float | None:
        """Time to the first token of any sample; None before there is one."""
        return min((s.ttft_s for s in self.samples if s.ttft_s is not None), default=None)

    def overlap_blocks(self) -> int:
        """Blocks that the router found on the instances that it chose."""
        return sum(sample.prepared.trace.overlap_blocks for sample in self.samples)

    def instances(self) -> list[str]:
        """The ids of all instances that worked on it, in order."""
        visited = (name for s in self.samples for name in s.prepared.trace.instances)
        return list(dict.fromkeys(visited))


def _parsed(deltas: list[Delta], parser: AnswerParser) -> list[Delta]:
    """The deltas with parts in place of their texts, without deltas that hold nothing yet."""
    parsed = []
    for delta in deltas:
        delta.parts = parser.feed(delta.text) if delta.text else []
        delta.text = ""
        if delta.finish_reason is not None:
            delta.parts += parser.finish()
            if parser.num_calls and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"
        if delta:
            parsed.append(delta)
    return parsed


def _prompt_entries(prepared: PreparedRequest, output: EngineOutput) -> list[TokenLogprob] | None:
    """Log-probabilities of all prompt tokens, if the request asked for them."""
    if output.prompt_logprobs is None:
        return None
    return [TokenLogprob(prepared.token_ids[0], None, []), *output.prompt_logprobs]
