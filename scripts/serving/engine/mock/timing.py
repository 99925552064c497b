"""How long the mock engine's steps and transfers take: pure functions of tokens, batch and bytes.

All times are in seconds. What has a rate of 0, and everything with `zero_delay`, takes exactly 0.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from serving.config import MockConfig
from serving.engine.core.step import Chunk


class Work(NamedTuple):
    """What one step computes. `prefill_pairs` are pairs of a prompt token and one before it,
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


def step_seconds(timing: MockConfig, work: Work, host_bytes: int = 0) -> float:
    """Time of a step that does `work`, after `host_bytes` of KV came back from host memory."""
    if timing.zero_delay:
        return 0.0
    seconds = _over(host_bytes, timing.host_bytes_per_s)
    if work.prefill_tokens or work.num_decodes:
        seconds += (
            timing.step_s
            + _over(work.prefill_tokens, timing.prefill_tokens_per_s)
            + work.prefill_pairs * timing.prefill_pair_s
            + work.num_decodes * timing.step_sequence_s
            + work.context_tokens * timing.step_context_token_s
        )
    return seconds / timing.speedup


def transfer_seconds(timing: MockConfig, num_bytes: int) -> float:
    """Time to fetch `num_bytes` of KV; nothing to fetch takes none."""
    if timing.zero_delay or num_bytes == 0:
        return 0.0
    seconds = timing.transfer_latency_s + _over(num_bytes, timing.transfer_bytes_per_s)
    return seconds / timing.speedup


def _over(amount: int, per_second: float) -> float:
    return amount / per_second if per_second else 0.0
