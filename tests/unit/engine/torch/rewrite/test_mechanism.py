"""A rewrite replaces what computes the same, and leaves alone what differs or fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from serving.engine.torch.rewrite.mechanism import (
    Differs,
    Forward,
    Observation,
    Pattern,
    rewrite,
)
from torch import nn


class Doubling(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


class AddToItself(Pattern):
    """Replaces whatever doubles its input."""

    kind = "doublings"
    tolerances = {torch.float32: 1e-6}  # noqa: RUF012

    def __init__(self, forward: Forward = lambda x: x + x) -> None:
        self._forward = forward

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        return [module for module in model.modules() if isinstance(module, Doubling)]

    def require_match(self, module: Any) -> None:
        if module.factor == 0:
            raise Differs("it has no factor")

    def observe(self, module: Any, forward: Forward) -> Observation:
        return Observation({"its output": forward(torch.ones(1, 5, 8))})

    def replacement(self, module: Any, original: Observation) -> Forward:
        return self._forward


def test_modules_that_compute_the_same_are_replaced() -> None:
    model = nn.Sequential(Doubling(), Doubling())
    report = rewrite(model, [AddToItself()])
    assert str(report) == "layer rewrite: 2 of 2 doublings"
    assert torch.equal(model(torch.ones(2)), 4 * torch.ones(2))
    assert all("forward" in vars(module) for module in model)


@pytest.mark.parametrize(
    ("factor", "forward", "reason"),
    [
        (2.001, lambda x: x + x, "its output would differ by 0.0005"),
        (0.0, lambda x: x + x, "it has no factor"),
        (2.0, lambda x: (x + x)[:, :2], "its output would have another shape"),
        (2.0, lambda x: x.no_such_thing, "AttributeError"),
    ],
    ids=["differs", "no match", "another shape", "raises"],
)
def test_modules_that_differ_or_fail_stay_as_they_were(
    factor: float, forward: Forward, reason: str
) -> None:
    model = nn.Sequential(Doubling(factor))
    report = rewrite(model, [AddToItself(forward)])
    assert str(report).startswith(f"layer rewrite: 0 of 1 doublings ({reason}")
    assert "forward" not in vars(model[0])


def test_a_model_without_known_patterns_is_reported_as_such() -> None:
    assert "nothing of a known pattern" in str(rewrite(nn.Linear(2, 2), [AddToItself()]))
