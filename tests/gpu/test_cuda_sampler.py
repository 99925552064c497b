"""The sampler on a real GPU: the same choices as on the CPU, and no waiting on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from serving.engine.core.sequence import Sequence
from serving.engine.torch.sampling.nucleus import top_p_threshold
from serving.engine.torch.sampling.sampler import Sampler
from serving.protocol import EngineRequest, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 32_000
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9, "temperature": 0.7},
    {"seed": 3, "top_p": 0.999, "temperature": 2.0},
    {"seed": 4, "top_k": 50, "min_p": 0.02, "logprobs": 3},
    {"seed": 5, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (2,)},
    {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"seed": 6, "repetition_penalty": 1.3, "logit_bias": ((3, 5.0), (4, -100.0))},
]


def sequences() -> list[Sequence]:
    return [
        Sequence(EngineRequest("r", [1, 5, 9], 3, SamplingParams(max_tokens=100, **kind)), 0, 0, 16)
        for kind in KINDS
    ]


def random_logits(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(KINDS), VOCAB, generator=generator) * 3


@contextmanager
def no_waiting() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_cuda_samples_the_tokens_of_the_cpu_without_synchronising() -> None:
    on_cpu, on_cuda = sequences(), sequences()
    cpu, cuda = Sampler(VOCAB, torch.device("cpu")), Sampler(VOCAB, torch.device("cuda"))
    for step in range(20):
        logits = random_logits(step)
        expected, expected_report = cpu.sample(logits, on_cpu).result()
        on_device = logits.cuda()
        torch.cuda.synchronize()
        with no_waiting():
            pending = cuda.sample(on_device, on_cuda)
        tokens, report = pending.result()
        assert pending.tokens.tolist() == tokens == expected
        for one, other in zip(report, expected_report, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [t for t, _ in one.top] == [t for t, _ in other.top]
        for one, other, token in zip(on_cpu, on_cuda, tokens, strict=True):
            one.tokens.append(token)
            other.tokens.append(token)


def test_top_p_search_finds_the_sorted_threshold() -> None:
    scale = torch.tensor([0.01, 0.5, 1.0, 2.0, 4.0, 8.0], device="cuda")[:, None]
    generator = torch.Generator("cuda").manual_seed(0)
    probs = torch.softmax(torch.randn(6, 128_256, device="cuda", generator=generator) * scale, -1)
    mass = torch.tensor([0.5, 0.9, 0.3, 0.95, 0.99, 0.7], device="cuda")
    ordered = probs.sort(dim=-1, descending=True).values.double()
    first = (ordered.cumsum(-1) >= mass[:, None].double()).int().argmax(-1, keepdim=True)
    torch.testing.assert_close(
        top_p_threshold(probs, mass), ordered.gather(1, first).float(), rtol=1e-4, atol=0
    )
