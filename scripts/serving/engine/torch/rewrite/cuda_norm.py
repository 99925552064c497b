"""RMSNorms on CUDA as one kernel each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.cuda.kernels import norm as kernels
from serving.engine.torch.rewrite.mechanism import (
    Differs,
    Forward,
    Observation,
    Pattern,
    difference,
)
from serving.engine.torch.rewrite.samples import sample_states

# Rounding of bfloat16 products differs by about 0.4%; a wrong formula by tens of percent.
CUDA_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}


class FusedNorm:
    """An RMSNorm, or the result that the layer before has prepared for it."""

    def __init__(self, weight: torch.Tensor, eps: float, style: int) -> None:
        self.weight, self.eps, self.style = weight, eps, style
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def prepare(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """`output` is the norm of `x`: use it if `x` is the next input."""
        self._input, self._output = x, output

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        given, output = self._input, self._output
        self._input = self._output = None
        # Identity is safe: the input was kept alive until now.
        if output is not None and x is given:
            return output
        return kernels.rms_norm(x.contiguous(), self.weight, self.eps, self.style)


class NormPattern(Pattern):
    """Norms with one weight; how they round is found by trying."""

    kind = "norms"
    tolerances = CUDA_TOLERANCES

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        return [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]

    def require_match(self, module: Any) -> None:
        parameters = dict(module.named_parameters())
        if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
            raise Differs("it has other parameters than one weight")

    def observe(self, module: Any, forward: Forward) -> Observation:
        return Observation({"its output": forward(self._sample(module))})

    def replacement(self, module: Any, original: Observation) -> Forward:
        eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
        x, weight = self._sample(module), module.weight
        errors = {
            style: difference(
                kernels.rms_norm(x, weight, eps, style), original.tensors["its output"]
            )
            for style in kernels.STYLES
        }
        return FusedNorm(weight, eps, min(errors, key=lambda style: errors[style] or 0.0))

    @staticmethod
    def _sample(module: Any) -> torch.Tensor:
        return sample_states(module.weight.shape[0], module.weight)


def fused_norm(module: nn.Module | None) -> FusedNorm | None:
    """The replacement of a norm; None where it was not replaced."""
    forward = getattr(module, "forward", None)
    return forward if isinstance(forward, FusedNorm) else None
