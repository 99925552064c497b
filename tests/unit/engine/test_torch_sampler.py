"""Which token is chosen: distributions, filters, penalties, logprobs, reproducibility."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving.engine.torch import sampler
from serving.engine.torch.sequence import Sequence
from serving.protocol import EngineRequest, SamplingParams
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 64


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    params = SamplingParams(max_tokens=100, **sampling)
    return Sequence(EngineRequest("r", prompt + output, len(prompt), params), 0, 0, 16)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Frequencies of `count` seeded draws from one row."""
    rows = [sequence([1], [], seed=seed, **sampling) for seed in range(count)]
    tokens, _ = sampler.sample(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_zero_temperature_is_the_likeliest_token() -> None:
    logits = random_logits(3)
    rows = [sequence([1], [], temperature=0.0) for _ in range(3)]
    assert sampler.sample(logits, rows)[0] == logits.argmax(-1).tolist()


def test_draws_follow_the_tempered_distribution() -> None:
    logits = random_logits(1)
    expected = torch.softmax(logits[0] / 0.7, -1)
    assert (draws(logits, 20_000, temperature=0.7) - expected).abs().max() < 0.015


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 1e-9},
    ],
)
def test_filters_keep_what_transformers_keeps(filters: dict[str, Any]) -> None:
    logits = random_logits(1, seed=4)
    warpers = LogitsProcessorList()
    if "top_k" in filters:
        warpers.append(TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        warpers.append(TopPLogitsWarper(filters["top_p"]))
    if "min_p" in filters:
        warpers.append(MinPLogitsWarper(filters["min_p"]))
    expected = torch.softmax(warpers(torch.tensor([[1]]), logits.clone()), -1)[0]
    seen = draws(logits, 20_000, **filters)
    assert (seen[expected == 0] == 0).all()
    assert (seen - expected).abs().max() < 0.015


def test_flat_distribution_over_a_large_vocabulary_is_filtered_exactly() -> None:
    """`top_p` needs more candidates than the quick look takes."""
    logits = random_logits(1, vocab=4000) * 0.01
    ranked = logits[0].argsort(descending=True)
    seen = draws(logits, 2_000, top_p=0.5)
    assert seen[ranked[:2000]].sum() > 0.97
    assert seen[ranked[2100:]].sum() == 0


def test_seeded_draw_does_not_depend_on_the_batch_or_on_other_rows() -> None:
    logits = random_logits(4)
    row = {"seed": 9, "top_p": 0.9}
    alone = sampler.sample(logits[2:3], [sequence([1], [4, 5], **row)])[0]
    others = [sequence([1], [], temperature=0.0), sequence([1], [2], seed=3)]
    among = sampler.sample(logits, [others[0], others[1], sequence([1], [4, 5], **row), others[1]])[
        0
    ]
    assert among[2] == alone[0]
    assert sampler.uniform(9, 2) != sampler.uniform(9, 3) != sampler.uniform(10, 3)


def test_unseeded_requests_differ_and_negative_seeds_work() -> None:
    logits = torch.zeros(40, VOCAB)
    assert len(set(sampler.sample(logits, [sequence([1], []) for _ in range(40)])[0])) > 5
    sampler.sample(logits[:1], [sequence([1], [], seed=-1)])


def test_penalties_follow_openai_and_transformers() -> None:
    logits = random_logits(3)
    prompt, output = [3, 4, 4], [5, 5, 6]
    rows = [
        sequence(prompt, output, presence_penalty=0.5, frequency_penalty=0.25),
        sequence(prompt, output, repetition_penalty=1.3),
        sequence(prompt, output),
    ]
    penalized = sampler._penalize(logits, rows)
    expected = logits.clone()
    expected[0, 5] -= 0.5 + 2 * 0.25
    expected[0, 6] -= 0.5 + 0.25
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected[1] = processor(torch.tensor([prompt + output]), logits[1:2].clone())[0]
    torch.testing.assert_close(penalized, expected)


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 10
    row = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,)}
    tokens, _ = sampler.sample(logits, [sequence([1], [5], **row), sequence([1], [5, 5], **row)])
    assert tokens[0] != 2
    assert tokens[1] == 2


def test_logprobs_are_the_models_own_before_temperature_and_penalties() -> None:
    logits = random_logits(3)
    rows = [
        sequence([1], [5], temperature=0.0, presence_penalty=2.0, logprobs=3),
        sequence([1], [], temperature=0.0),
        sequence([1], [], temperature=0.5, seed=1, logprobs=0),
    ]
    tokens, report = sampler.sample(logits, rows)
    expected = torch.log_softmax(logits, -1)
    first, none, last = report
    assert none is None
    assert first is not None
    assert first.token_id == tokens[0]
    assert first.logprob == pytest.approx(float(expected[0, tokens[0]]))
    top = expected[0].topk(3)
    assert [t for t, _ in first.top] == top.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(top.values.tolist())
    assert last is not None
    assert last.top == []
    assert last.logprob == pytest.approx(float(expected[2, tokens[2]]))
