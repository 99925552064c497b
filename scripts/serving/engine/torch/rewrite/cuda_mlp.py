"""Gated MLPs on CUDA, with gate and up as one matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.cuda.kernels.activation import ACTIVATIONS, gated_activation
from serving.engine.torch.cuda.kernels.linear import linear
from serving.engine.torch.rewrite.cuda_norm import CUDA_TOLERANCES
from serving.engine.torch.rewrite.mechanism import (
    Differs,
    Forward,
    Observation,
    Pattern,
    difference,
)
from serving.engine.torch.rewrite.samples import has_children, sample_states


class MlpPattern(Pattern):
    """down(act(gate(x)) * up(x))."""

    kind = "MLPs"
    tolerances = CUDA_TOLERANCES

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        names = ("gate_proj", "up_proj", "down_proj", "act_fn")
        return [module for module in model.modules() if has_children(module, names)]

    def require_match(self, module: Any) -> None:
        if type(module.gate_proj) is not nn.Linear or type(module.down_proj) is not nn.Linear:
            raise Differs("its projections are not plain linear layers")

    def observe(self, module: Any, forward: Forward) -> Observation:
        return Observation({"its output": forward(self._sample(module))})

    def replacement(self, module: Any, original: Observation) -> Forward:
        gate = module.gate_proj(self._sample(module))
        theirs = module.act_fn(gate)
        # A gate beside an up of ones is the activation alone.
        joint = torch.cat([gate, torch.ones_like(gate)], -1)
        for activation in ACTIVATIONS:
            error = difference(gated_activation(joint, activation), theirs)
            if error is not None and error <= self.tolerances[theirs.dtype]:
                return _FusedMlp(module, activation)
        raise Differs("no kernel for its activation")

    @staticmethod
    def _sample(module: Any) -> torch.Tensor:
        return sample_states(module.gate_proj.in_features, module.gate_proj.weight)


class _FusedMlp:
    def __init__(self, module: Any, activation: str) -> None:
        self._weight, self._bias = join([module.gate_proj, module.up_proj])
        self._down, self._activation = module.down_proj, activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        joint = linear(x, self._weight, self._bias)
        hidden = gated_activation(joint, self._activation)
        return linear(hidden, self._down.weight, self._down.bias)


def join(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) of several linears as one; theirs become views of it, so that nothing
    is held twice. Raises Differs when they cannot be joined."""
    if any(type(each) is not nn.Linear for each in linears):
        raise Differs("a projection is not a plain linear layer")
    if len({each.bias is None for each in linears}) != 1:
        raise Differs("only some projections have a bias")
    sizes = [each.out_features for each in linears]
    weight = torch.cat([each.weight for each in linears])
    bias = None if linears[0].bias is None else torch.cat([each.bias for each in linears])
    for each, part in zip(linears, torch.split(weight, sizes), strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)
    return weight, bias
