"""Which token is chosen: distributions, filters, penalties, logprobs, reproducibility."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from serving.engine.core.sequence import Sequence, State
from serving.engine.torch.sampling import draws as draws_module
from serving.engine.torch.sampling.nucleus import top_p_threshold
from serving.engine.torch.sampling.penalties import Penalties
from serving.engine.torch.sampling.sampler import Sampler
from serving.protocol import EngineRequest, SamplingParams, TokenLogprob
from torch.utils._python_dispatch import TorchDispatchMode
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


def sample(
    logits: torch.Tensor, sequences: list[Sequence]
) -> tuple[list[int], list[TokenLogprob | None]]:
    return Sampler(logits.shape[-1], torch.device("cpu")).sample(logits, sequences).result()


def draws(logits: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Frequencies of `count` seeded draws from one row."""
    rows = [sequence([1], [], seed=seed, **sampling) for seed in range(count)]
    tokens, _ = sample(logits.expand(count, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / count


def test_zero_temperature_is_the_likeliest_token() -> None:
    logits = random_logits(3)
    rows = [sequence([1], [], temperature=0.0) for _ in range(3)]
    assert sample(logits, rows)[0] == logits.argmax(-1).tolist()


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
    alone = sample(logits[2:3], [sequence([1], [4, 5], **row)])[0]
    others = [sequence([1], [], temperature=0.0), sequence([1], [2], seed=3)]
    among = sample(logits, [others[0], others[1], sequence([1], [4, 5], **row), others[1]])[0]
    assert among[2] == alone[0]


def test_unseeded_requests_differ_and_negative_seeds_work() -> None:
    logits = torch.zeros(40, VOCAB)
    assert len(set(sample(logits, [sequence([1], []) for _ in range(40)])[0])) > 5
    sample(logits[:1], [sequence([1], [], seed=-1)])


def penalized(logits: torch.Tensor, prompt: list[int], output: list[int]) -> torch.Tensor:
    """What row 0 (presence, frequency) and row 1 (repetition) must become, by transformers."""
    expected = logits.clone()
    for token in set(output):
        expected[0, token] -= 0.5 + output.count(token) * 0.25
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected[1] = processor(torch.tensor([prompt + output]), logits[1:2].clone())[0]
    return expected


def test_penalties_follow_openai_and_transformers_as_sequences_grow_and_change_places() -> None:
    prompt, output = [3, 4, 4], [5, 5, 6]
    first = sequence(prompt, output, presence_penalty=0.5, frequency_penalty=0.25)
    second = sequence(prompt, output, repetition_penalty=1.3)
    penalties = Penalties(VOCAB, torch.device("cpu"))
    logits = random_logits(2)
    before = logits.clone()
    torch.testing.assert_close(
        penalties.apply(logits, [first, second]), penalized(logits, prompt, output)
    )
    torch.testing.assert_close(logits, before)
    first.tokens += [7, 5]
    second.tokens += [7, 5]
    expected = penalized(logits, prompt, [*output, 7, 5])
    torch.testing.assert_close(penalties.apply(logits, [first, second]), expected)
    swapped = penalties.apply(logits.flip(0), [second, first]).flip(0)
    torch.testing.assert_close(swapped, expected)


def test_a_place_among_the_penalized_is_cleared_for_the_next_one() -> None:
    penalties = Penalties(VOCAB, torch.device("cpu"))
    old = sequence([3], [5, 6], presence_penalty=0.5, repetition_penalty=1.3)
    logits = random_logits(2)
    penalties.apply(logits[:1], [old])
    old.state = State.DONE
    new = sequence([9], [10], presence_penalty=0.5, frequency_penalty=0.25)
    other = sequence([9], [10], repetition_penalty=1.3)
    torch.testing.assert_close(penalties.apply(logits, [new, other]), penalized(logits, [9], [10]))


def test_penalties_leave_other_rows_alone_and_change_the_choice() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6] = 2.0, 1.0
    plain = {"temperature": 0.0}
    rows = [sequence([1], [5], **plain), sequence([1], [5], presence_penalty=2.0, **plain)]
    assert sample(logits, rows)[0] == [5, 6]


def test_logit_bias_changes_the_choice_of_its_own_row() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = 2.0
    rows = [
        sequence([1], [], temperature=0.0, logit_bias=((7, 3.0), (8, 1.0))),
        sequence([1], [], temperature=0.0),
        sequence([1], [], seed=1, logit_bias=((9, 100.0),)),
    ]
    tokens, _ = sample(logits, rows)
    assert tokens == [7, 5, 9]
    banned = [sequence([1], [], seed=i, logit_bias=((5, -100.0),)) for i in range(300)]
    assert 5 not in sample(logits[:1].expand(300, -1), banned)[0]


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 10
    row = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,)}
    tokens, _ = sample(logits, [sequence([1], [5], **row), sequence([1], [5, 5], **row)])
    assert tokens[0] != 2
    assert tokens[1] == 2


def test_logprobs_are_the_models_own_before_temperature_and_penalties() -> None:
    logits = random_logits(3)
    rows = [
        sequence([1], [5], temperature=0.0, presence_penalty=2.0, logprobs=3),
        sequence([1], [], temperature=0.0),
        sequence([1], [], temperature=0.5, seed=1, logprobs=0),
    ]
    tokens, report = sample(logits, rows)
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


# --- randomness --------------------------------------------------------------------------------


def test_split_mix_gives_the_published_numbers() -> None:
    """The reference sequence of SplitMix64 from state 1234567."""
    words = draws_module.split_mix(np.uint64([1234567]), np.arange(5, dtype=np.uint64))
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_are_uniform_over_positions_and_over_neighbouring_seeds() -> None:
    """Chi-square over 64 bins, and no correlation between neighbours (5 sigma each)."""
    seeds = np.arange(2000, dtype=np.uint64)[:, None]
    numbers = draws_module.uniforms(seeds, np.arange(200, dtype=np.uint64))
    assert 0 <= numbers.min() < numbers.max() < 1
    for some in (numbers, numbers[:, :1], numbers[:10]):
        counts = np.bincount((some.ravel() * 64).astype(int), minlength=64)
        expected = some.size / 64
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(one.size)


def test_seeded_output_is_the_same_step_by_step_in_changing_company() -> None:
    """Forty tokens alone, and the same forty while others come and go: beyond one upload."""
    logits = random_logits(40, seed=3)

    def tokens(companions: int) -> list[int]:
        sampler = Sampler(VOCAB, torch.device("cpu"))
        own = sequence([1], [], seed=77, top_p=0.95, temperature=1.3)
        for step in range(40):
            others = [sequence([1], [2] * step) for _ in range(companions and step % 7)]
            batch = torch.cat([random_logits(len(others), seed=step), logits[step : step + 1]])
            own.tokens.append(sampler.sample(batch, [*others, own]).result()[0][-1])
        return own.tokens[1:]

    alone = tokens(0)
    assert alone == tokens(1)
    assert len(set(alone)) > 5


def test_min_tokens_ends_in_the_middle_of_an_uploaded_batch() -> None:
    sampler = Sampler(VOCAB, torch.device("cpu"))
    own = sequence([1], [], temperature=0.0, min_tokens=3, stop_token_ids=(2, VOCAB + 5))
    logits = torch.zeros(1, VOCAB)
    logits[:, 2] = 10
    chosen = []
    for _ in range(5):
        chosen += sampler.sample(logits, [own]).result()[0]
        own.tokens.append(chosen[-1])
    assert [token == 2 for token in chosen] == [False, False, False, True, True]


# --- no waiting --------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device: values, and shapes that depend on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}
        assert name not in waits, f"{name} waits"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_before_the_result() -> None:
    logits = random_logits(6)
    rows = [
        sequence([1], [], temperature=0.0),
        sequence([1], [], seed=1, top_k=5, min_p=0.1, logprobs=3),
        sequence([1], [4], temperature=0.0, min_tokens=9, stop_token_ids=(2,)),
        sequence([1], [4], frequency_penalty=1.0, logprobs=0),
        sequence([1, 3], [4], repetition_penalty=1.5, logit_bias=((3, 1.0),)),
        sequence([1], [4, 5]),
    ]
    sampler = Sampler(VOCAB, torch.device("cpu"))
    with NoWaiting():
        pending = sampler.sample(logits, rows)
        for row in rows:
            row.tokens.append(0)
        later = sampler.sample(logits, rows)
    assert pending.result()[0] == pending.tokens.tolist()
    assert later.result()[1][1] is not None


@pytest.mark.parametrize("batch", [1, 3])
def test_all_greedy_batch_is_one_argmax(batch: int) -> None:
    ops: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            ops.append(func.__name__.split(".")[0])
            return func(*args, **(kw or {}))

    rows = [sequence([1], [], temperature=0.0) for _ in range(batch)]
    sampler = Sampler(VOCAB, torch.device("cpu"))
    sampler.sample(random_logits(batch), rows)
    for row in rows:
        row.tokens.append(0)
    with Recorder():
        sampler.sample(random_logits(batch), rows)
    assert ops[-1:] == ["argmax"]
    assert set(ops) <= {"argmax", "randn", "mul"}  # and what `random_logits` does


# --- thresholds --------------------------------------------------------------------------------


@pytest.fixture
def triton_search() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to run GPU kernels on the CPU")
    from serving.engine.torch.sampling.nucleus_triton import search_threshold

    return search_threshold


def thresholds_by_sorting(probs: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(len(probs), 1)
    for row in range(len(probs)):
        ordered = probs[row].double().sort(descending=True).values
        reached = (ordered.cumsum(0) >= mass[row].double()).nonzero()
        if len(reached):
            result[row] = ordered[reached[0, 0]].float()
    return result


def spread_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Peaked, usual and nearly flat rows, some with ties and some with zeros."""
    scale = torch.tensor([0.01, 0.5, 2.0, 8.0, 1.0, 3.0])[:, None]
    probs = torch.softmax(random_logits(6, seed=8, vocab=5000) * scale, -1)
    probs[4] = 1 / 5000
    probs[5, 100:] = 0
    return probs, torch.tensor([0.5, 0.9, 0.3, 0.95, 0.7005, 0.25])


def test_top_p_threshold_is_the_sorted_one() -> None:
    probs, mass = spread_rows()
    torch.testing.assert_close(
        top_p_threshold(probs, mass), thresholds_by_sorting(probs, mass), rtol=1e-4, atol=0
    )


def test_top_p_search_of_the_gpu_finds_the_sorted_threshold(triton_search: Any) -> None:
    probs, mass = spread_rows()
    torch.testing.assert_close(
        triton_search(probs, mass), thresholds_by_sorting(probs, mass), rtol=1e-4, atol=0
    )
    tiny = torch.full((6,), 1e-12)
    torch.testing.assert_close(triton_search(probs, tiny), probs.amax(-1, keepdim=True))
    assert (triton_search(probs, torch.full((6,), 2.0)) == 0).all()
