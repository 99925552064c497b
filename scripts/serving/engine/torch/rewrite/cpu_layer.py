"""Whole decoder layers on CPU: fewer operations and calls around the matrix products.

A step over one token spends as much time between the matrix products of a small model as in them.
Layers of the usual shape (a norm before attention and before a gated MLP, rotary positions) are
run by one function each. Rounding is not that of the original, so float32 engines, whose tokens are
those of `generate`, are not rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cpu.packed_linear import SiblingLinear, Siblings
from serving.engine.torch.rewrite.mechanism import (
    Differs,
    Forward,
    Observation,
    Pattern,
    RewriteReport,
    decoder_layers,
    rewrite,
)
from serving.engine.torch.rewrite.samples import (
    AttentionRecorder,
    require_children,
    sample_rotation,
    sample_states,
)

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Rounding differs by about 1e-6 and int8 by less than 1e-3; a wrong formula by tens of percent.
_TOLERANCES = {torch.float32: 0.005}
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


def rewrite_for_cpu(model: nn.Module) -> RewriteReport:
    """Rewrite an int8 model in place, after its linears were packed."""
    return rewrite(model, [CpuLayerPattern()])


class CpuLayerPattern(Pattern):
    """Decoder layers with packed linears."""

    kind = "layers"
    tolerances = _TOLERANCES

    def __init__(self) -> None:
        self._rotation = _StepRotation()

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        return decoder_layers(model)

    def require_match(self, module: Any) -> None:
        require_children("layer", module, _LAYER)
        norms = ("q_norm", "k_norm") if hasattr(module.self_attn, "q_norm") else ()
        require_children("attention", module.self_attn, (*_ATTENTION, *norms))
        require_children("MLP", module.mlp, _MLP)

    def observe(self, module: Any, forward: Forward) -> Observation:
        weight = module.input_layernorm.weight
        recorder = AttentionRecorder()
        output = forward(
            sample_states(weight.shape[0], weight),
            position_embeddings=sample_rotation(module.self_attn.head_dim, weight),
            attention_mask=None,
            kv_step=recorder,
        )
        return recorder.observation(output)

    def replacement(self, module: Any, original: Observation) -> Forward:
        assert original.options is not None, "its attention was recorded"
        return _CpuLayer(module, original.options, self._rotation)


class _StepRotation:
    """Cosines and signed sines of a step, `[T, 1, D]`, made by the first layer for all of them."""

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None
        self._made: tuple[torch.Tensor, torch.Tensor]

    def __call__(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = position_embeddings
        if sin is not self._given:  # identity is safe: it is kept alive
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)
            self._given, self._made = sin, (cos[0, :, None], signed)
        return self._made


class _CpuLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)); hidden states are `[1, T, K]`."""

    def __init__(self, module: Any, options: AttentionOptions, rotation: _StepRotation) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._options, self._rotation = options, rotation
        self._index: int = attention.layer_idx
        self._dim: int = attention.head_dim
        self._qkv = _joint(attention, _ATTENTION[:3])
        self._num_q = attention.q_proj.out_features // self._dim
        self._num_kv = attention.k_proj.out_features // self._dim
        self._o_proj = attention.o_proj.forward
        self._gate_up, self._down = _joint(mlp, _MLP[:2]), mlp.down_proj.forward
        self._activation, self._width = mlp.act_fn.forward, mlp.gate_proj.out_features
        self._norms = (_norm(module.input_layernorm), _norm(module.post_attention_layernorm))
        self._head_norms = None
        if hasattr(attention, "q_norm"):
            self._head_norms = (_norm(attention.q_norm), _norm(attention.k_norm))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        kv_step: Any,
        **__: Any,
    ) -> torch.Tensor:
        num_q, num_rotating = self._num_q, self._num_q + self._num_kv
        num_tokens = hidden_states.shape[1]
        joint = self._qkv(self._norms[0](hidden_states)).view(num_tokens, -1, self._dim)
        heads = joint[:, :num_rotating]
        if self._head_norms is not None:
            q_norm, k_norm = self._head_norms
            heads = torch.cat((q_norm(heads[:, :num_q]), k_norm(heads[:, num_q:])), dim=1)
        cos, sin = self._rotation(position_embeddings)
        half = self._dim // 2
        swapped = torch.cat((heads[..., half:], heads[..., :half]), dim=-1)
        heads = torch.addcmul(heads * cos, swapped, sin)
        query, key = heads[:, :num_q].transpose(0, 1), heads[:, num_q:].transpose(0, 1)
        value = joint[:, num_rotating:].transpose(0, 1)
        attended = kv_step.attend(self._index, query, key, value, self._options)
        out: torch.Tensor = self._o_proj(attended.reshape(1, num_tokens, -1)).add_(hidden_states)
        joint = self._gate_up(self._norms[1](out))
        gate, up = joint[..., : self._width], joint[..., self._width :]
        return out.add_(self._down(self._activation(gate).mul_(up)))


def _joint(parent: nn.Module, names: tuple[str, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The one product that gives the outputs of all of `names`."""
    linears = [getattr(parent, name) for name in names]
    if not all(isinstance(linear, SiblingLinear) for linear in linears):
        raise Differs(f"{', '.join(names)} are not packed as one")
    siblings: Siblings = linears[0].siblings
    assert [linear.index for linear in linears] == list(range(len(names)))
    return siblings.joint.forward


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if not type(module).__name__.endswith("RMSNorm"):
        raise Differs(f"its norm is a {type(module).__name__}")
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    weight = module.weight.detach()
    share, epsilon = 1 / weight.shape[0], torch.tensor(eps)

    def norm(x: torch.Tensor) -> torch.Tensor:
        # Half the time of torch's rms_norm, which is as many operations and several more.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = torch.addcmul(epsilon, length, length, value=share).rsqrt_()
        return torch.mul(x, factor).mul_(weight)

    return norm
