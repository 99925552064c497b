"""How long a worker takes: one model for the mock engine, the simulator and capacity plans.

Pure functions of tokens and batch. All times are in seconds; a rate of 0 means no time at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from serving.config import MockConfig, PlanConfig
from serving.engine.core.step import Chunk


class Work(NamedTuple):
    """The work of one step. `prefill_pairs` are pairs of a prompt token and one before it,
    `context_tokens` those that come before the tokens being decoded."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    num_decodes: int = 0
    context_tokens: int = 0


def work_of(chunks: Iterable[Chunk]) -> Work:
    """A chunk is a decode when it computes one token, and that one was generated."""
    tokens = pairs = decodes = context = 0
    for chunk in chunks:
        if chunk.length == 1 and chunk.start >= chunk.sequence.num_prompt:
            decodes += 1
            context += chunk.start
        else:
            tokens += chunk.length
            pairs += chunk.length * chunk.start + chunk.length * (chunk.length - 1) // 2
    return Work(tokens, pairs, decodes, context)


class WorkerSpeed(Struct, frozen=True):
    """What one worker can do. See `config.MockConfig` for meanings.

    A transfer moves the KV of a prompt from a prefill to a decode worker; `host_tokens_per_s` is
    the rate at which KV comes back from host memory.
    """

    prefill_tokens_per_s: float = 20_000.0
    prefill_pair_s: float = 0.0
    step_s: float = 0.02
    step_sequence_s: float = 0.0
    step_context_token_s: float = 0.0
    transfer_tokens_per_s: float = 1e6
    transfer_latency_s: float = 0.005
    host_tokens_per_s: float = 0.0

    @classmethod
    def from_mock(cls, mock: MockConfig, kv_token_bytes: int) -> WorkerSpeed:
        """`kv_token_bytes`: KV of one token in all layers. `zero_delay` takes exactly no time."""
        if mock.zero_delay:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return cls(
            prefill_tokens_per_s=mock.prefill_tokens_per_s * mock.speedup,
            prefill_pair_s=mock.prefill_pair_s / mock.speedup,
            step_s=mock.step_s / mock.speedup,
            step_sequence_s=mock.step_sequence_s / mock.speedup,
            step_context_token_s=mock.step_context_token_s / mock.speedup,
            transfer_tokens_per_s=mock.transfer_bytes_per_s * mock.speedup / kv_token_bytes,
            transfer_latency_s=mock.transfer_latency_s / mock.speedup,
            host_tokens_per_s=mock.host_bytes_per_s * mock.speedup / kv_token_bytes,
        )

    @classmethod
    def from_plan(cls, plan: PlanConfig) -> WorkerSpeed:
        """`plan.step_s` is the step of a single sequence, so one sequence's share is taken off."""
        return cls(
            prefill_tokens_per_s=plan.prefill_tokens_per_s,
            step_s=plan.step_s - plan.step_per_sequence_s,
            step_sequence_s=plan.step_per_sequence_s,
            transfer_tokens_per_s=plan.transfer_tokens_per_s,
        )

    def prefill_time_s(self, num_tokens: int, num_pairs: int = 0) -> float:
        """Time that prompt tokens take within steps; `num_pairs` as `Work.prefill_pairs`."""
        return _over(num_tokens, self.prefill_tokens_per_s) + num_pairs * self.prefill_pair_s

    def step_time_s(self, work: Work, host_tokens: int = 0) -> float:
        """Time of a step that does `work`, after KV of `host_tokens` came back from host memory."""
        seconds = _over(host_tokens, self.host_tokens_per_s)
        if work.prefill_tokens or work.num_decodes:
            seconds += (
                self.step_s
                + self.prefill_time_s(work.prefill_tokens, work.prefill_pairs)
                + work.num_decodes * self.step_sequence_s
                + work.context_tokens * self.step_context_token_s
            )
        return seconds

    def transfer_time_s(self, num_tokens: int) -> float:
        """Time to fetch the KV of `num_tokens`; nothing to fetch takes none."""
        if num_tokens == 0:
            return 0.0
        return self.transfer_latency_s + _over(num_tokens, self.transfer_tokens_per_s)


def _over(amount: int, per_second: float) -> float:
    return amount / per_second if per_second else 0.0
