"""Decoder layers on CPU without the small change: fewer operations and calls around the products.

A step over one token spends as much time between the matrix products of a small model as in them.
Layers of the usual shape (a norm before attention and before a gated MLP, rotary positions) are
run by one function each. As in `fusion`, they are found by the children that they have and proven:
a rewritten layer is run against the original on random input, and stays as it was where the two
differ, so a layer that scales its residual or skips its rotation is left alone. Rounding is not
that of the original, so float32 engines, whose tokens are those of `generate`, do not use this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cpu.packed_linear import SiblingLinear, Siblings

# Rounding differs by about 1e-6 and int8 by less than 1e-3; a wrong formula by tens of percent.
_TOLERANCE = 0.005
_TEST_TOKENS = 5

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Unlike(Exception):
    """The layer is not of the shape that is rewritten; the text says what differs."""


@torch.inference_mode()
def rewrite(model: nn.Module) -> str:
    """Rewrite `model` in place after its linears were packed; returns a line for the log."""
    shared = _Rotation()
    found = rewritten = 0
    reason = ""
    for container in list(model.modules()):
        layers = getattr(container, "layers", None)
        for layer in layers if isinstance(layers, nn.ModuleList) else []:
            found += 1
            try:
                _rewrite_layer(layer, shared)
                rewritten += 1
            except Unlike as exc:
                reason = reason or str(exc)
            except (AttributeError, TypeError, ValueError, RuntimeError) as exc:
                # A layer that takes or gives other things than those we call it with.
                reason = reason or f"{type(exc).__name__}: {str(exc).splitlines()[0][:80]}"
    return f"{rewritten} of {found} layers run lean" + (f" ({reason})" if reason else "")


class _Rotation:
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


class _Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)); hidden states are `[1, T, K]`."""

    def __init__(self, module: Any, options: AttentionOptions, shared: _Rotation) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._options, self._shared = options, shared
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
            of_q, of_k = self._head_norms
            heads = torch.cat((of_q(heads[:, :num_q]), of_k(heads[:, num_q:])), dim=1)
        cos, sin = self._shared(position_embeddings)
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


def _rewrite_layer(layer: Any, shared: _Rotation) -> None:
    _require_children("layer", layer, _LAYER)
    attention = layer.self_attn
    norms = ("q_norm", "k_norm") if hasattr(attention, "q_norm") else ()
    _require_children("attention", attention, (*_ATTENTION, *norms))
    _require_children("MLP", layer.mlp, _MLP)
    generator = torch.Generator().manual_seed(0)
    width = layer.input_layernorm.weight.shape[0]
    x = torch.randn((1, _TEST_TOKENS, width), generator=generator)
    angle = torch.linspace(0.1, 3.0, attention.head_dim // 2)
    angle = angle * torch.arange(1, _TEST_TOKENS + 1)[:, None]
    angle = torch.cat((angle, angle), dim=-1)[None]
    arguments: dict[str, Any] = {
        "position_embeddings": (angle.cos(), angle.sin()),
        "attention_mask": None,
    }
    theirs, ours = _Witness(), _Witness()
    expected = layer(x, **arguments, kv_step=theirs)
    if not isinstance(expected, torch.Tensor) or theirs.options is None:
        raise Unlike("a layer returns more than its hidden states")
    lean = _Layer(layer, theirs.options, shared)
    seen = [lean(x, **arguments, kv_step=ours), *ours.seen]
    what = ("its output", "its queries", "its keys", "its values")
    for name, mine, original in zip(what, seen, [expected, *theirs.seen], strict=True):
        error = float((mine - original).norm() / original.norm().clamp_min(1e-20))
        if not error <= _TOLERANCE:
            raise Unlike(f"{name} would differ by {error:.2g}")
    layer.forward = lean


class _Witness:
    """Stands behind one attention layer and keeps what it was given.

    Its "attention" hands the queries back, so that the output projection is compared as well.
    """

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.options: AttentionOptions | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.seen, self.options = [query, key, value], options
        return query.transpose(0, 1)


def _require_children(what: str, module: nn.Module, names: tuple[str, ...]) -> None:
    found = {name for name, _ in module.named_children()}
    if found != set(names):
        differing = ", ".join(sorted(found ^ set(names)))
        raise Unlike(f"its {what} has other children than the usual ones: {differing}")


def _joint(parent: nn.Module, names: tuple[str, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The one product that gives the outputs of all of `names`."""
    linears = [getattr(parent, name) for name in names]
    if not all(isinstance(linear, SiblingLinear) for linear in linears):
        raise Unlike(f"{', '.join(names)} are not packed as one")
    siblings: Siblings = linears[0].siblings
    assert [linear.index for linear in linears] == list(range(len(names)))
    return siblings.joint.forward


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if not type(module).__name__.endswith("RMSNorm"):
        raise Unlike(f"its norm is a {type(module).__name__}")
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    weight = module.weight.detach()
    share, epsilon = 1 / weight.shape[0], torch.tensor(eps)

    def norm(x: torch.Tensor) -> torch.Tensor:
        # Half the time of torch's rms_norm, which is as many operations and several more.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = torch.addcmul(epsilon, length, length, value=share).rsqrt_()
        return torch.mul(x, factor).mul_(weight)

    return norm
