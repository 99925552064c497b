"""Test code. One request in the engine's thread: the real engine's words to ours, and back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from serving.protocol import EngineOutput, SamplingParams, TokenLogprob

from tensorrt_llm import _generate
from tensorrt_llm.executor.result import GenerationResult, Logprob, Response

_BINDINGS = "tensorrt_llm.bindings.executor"
_METRICS: Any = {
    name: _generate.plain(name, _BINDINGS)
    for name in ("RequestPerfMetrics", "TimingMetrics", "KvCacheMetrics")
}


def now() -> timedelta:
    return timedelta(seconds=time.monotonic())


@dataclass(eq=False)
class Job:
    """`num_told` output tokens have been answered; `logprobs` as many entries as the engine gave."""

    id: int
    prompt: list[int]
    params: Any  # SamplingParams of the caller
    streaming: bool
    disaggregated: Any
    cache_salt: str | None
    result: GenerationResult
    stream_interval: int = 1
    always_greedy: bool = False
    pending: Response = field(default_factory=Response)
    num_told: int = 0
    num_tokens: int = 0
    timing: Any = field(default_factory=_METRICS["TimingMetrics"])
    num_cached: int = 0

    def __post_init__(self) -> None:
        self.timing.arrival_time = self.timing.first_scheduled_time = now()

    @property
    def key(self) -> str:
        return str(self.id)

    @property
    def request_type(self) -> str:
        kind = None if self.disaggregated is None else self.disaggregated.request_type
        return kind or "context_and_generation"

    @property
    def stop_token_ids(self) -> set[int]:
        return set(self.params.stop_token_ids or []) | self._end_ids

    @property
    def _end_ids(self) -> set[int]:
        end_id = self.params.end_id
        return set() if self.params.ignore_eos or end_id is None else {end_id}

    def sampling(self) -> SamplingParams:
        """The torch engine's parameters. A seed that is not given is 0, not random."""
        p = self.params
        return SamplingParams(
            max_tokens=p.max_tokens,
            min_tokens=p.min_tokens or 0,
            temperature=self._temperature,
            top_p=1.0 if p.top_p is None else p.top_p,
            top_k=p.top_k or 0,
            min_p=p.min_p or 0.0,
            presence_penalty=p.presence_penalty or 0.0,
            frequency_penalty=p.frequency_penalty or 0.0,
            repetition_penalty=1.0 if p.repetition_penalty is None else p.repetition_penalty,
            seed=p.seed or 0,
            stop_token_ids=tuple(sorted(self.stop_token_ids)),
            logprobs=p.logprobs or None,
        )

    @property
    def _temperature(self) -> float:
        if self.always_greedy or self.params._greedy_decoding:
            return 0.0
        return 1.0 if self.params.temperature is None else self.params.temperature

    def begin_with(self, tokens: list[int], logprobs: list[Any] | None) -> None:
        """The context's tokens, told again with the first response."""
        self.pending.token_ids += tokens
        self.pending.num_old = len(tokens)
        self.num_tokens = len(tokens)
        if self.params.logprobs and logprobs:
            self.pending.logprobs = list(logprobs)

    def add(self, output: EngineOutput) -> None:
        """Take in what the engine did; what the caller sees of its end is decided here."""
        self.timing.last_token_time = now()
        if self.timing.first_token_time is None:
            self.timing.first_token_time = self.timing.last_token_time
        if output.cached_tokens is not None:
            self.num_cached = self.pending.cached_tokens = output.cached_tokens
        self.pending.token_ids += output.token_ids
        self.num_tokens += len(output.token_ids)
        if output.logprobs:
            self._add_logprobs([_as_dict(each) for each in output.logprobs])
        if output.error is not None:
            self.pending.error = output.error.message
        elif output.finish_reason == "stop":
            assert output.stop_token_id is not None
            self.stop_with(output.stop_token_id)
        elif output.finish_reason is not None:
            self.pending.finish_reason = output.finish_reason

    def stop_with(self, token: int, *, is_pending: bool = False) -> None:
        """The end token stays in the output; another stop token is cut off by the result.

        The real engine looks for `end_id`, then for `max_tokens`, then for other stops.
        """
        pending = self.pending
        if not is_pending:
            pending.token_ids.append(token)
            self.num_tokens += 1
            if self.params.logprobs:
                # The torch engine reports none for the token that ends a request.
                self._add_logprobs([{token: Logprob(logprob=float("nan"))}])
        if token not in self._end_ids and self.num_tokens >= self.params.max_tokens:
            pending.finish_reason = "length"
            return
        pending.finish_reason = "stop"
        if token not in self._end_ids:
            pending.cut_stop_token, pending.stop_reason = True, token

    def answer(self, *, block_size: int, with_metrics: bool) -> None:
        """Send what is pending, if it is time to."""
        pending = self.pending
        is_last = pending.finish_reason is not None or pending.error is not None
        if not is_last:
            if not self.streaming:
                return
            is_due = self.num_told == 0 or self.num_tokens - self.num_told >= self.stream_interval
            if not is_due or not pending.token_ids:
                return
        elif with_metrics:
            pending.request_perf_metrics = self._metrics(block_size)
        self.num_told = self.num_tokens
        self.pending = Response()
        self.result._inbox.put(pending)

    def fail(self, message: str) -> None:
        self.result._inbox.put(Response(error=message))

    def _add_logprobs(self, entries: list[Any]) -> None:
        self.pending.logprobs = (self.pending.logprobs or []) + entries

    def _metrics(self, block_size: int) -> Any:
        metrics, cache = _METRICS["RequestPerfMetrics"](), _METRICS["KvCacheMetrics"]()
        total = -(-(len(self.prompt) + self.num_tokens) // block_size)
        reused = self.num_cached // block_size
        cache.num_total_allocated_blocks = total
        cache.num_reused_blocks, cache.num_new_allocated_blocks = reused, total - reused
        cache.num_missed_blocks = -(-len(self.prompt) // block_size) - reused
        cache.kv_cache_hit_rate = reused / max(1, reused + cache.num_missed_blocks)
        metrics.timing_metrics, metrics.kv_cache_metrics = self.timing, cache
        return metrics


def _as_dict(logprob: TokenLogprob) -> dict[int, Any]:
    """Integer keys; the chosen token is there whatever its rank."""
    entries = {
        token: Logprob(logprob=value, rank=rank)
        for rank, (token, value) in enumerate(logprob.top, 1)
    }
    entries.setdefault(logprob.token_id, Logprob(logprob=logprob.logprob))
    return entries
