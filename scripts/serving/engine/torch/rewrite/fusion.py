"""Rewrites a loaded model so that its small operations run fused; the model stays transformers'.

What can be fused is found by pattern (the children a module has, the operations it should then
do), never by a model's name, and proven: each rewritten module is run against the original on
random input, and stays as it was when the two differ. So a layer that scales its residual, skips
its rotation or adds a norm is left alone, whatever it is called. What was not fused runs as
transformers wrote it, and `Report` says so.

Rewriting replaces `forward` on the instance: attributes, names and weights stay where they are.
Joined weights are one tensor; the original parameters become views of it, so nothing is held twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cuda import kernels
from serving.engine.torch.kv.pool import KvPool
from serving.kv_layout import KvLayout

# Rounding of bfloat16 products differs by about 0.4%; a wrong formula by tens of percent.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}
_TEST_TOKENS = 5


@dataclass
class Report:
    """How many modules of each kind were found and how many of them were fused."""

    found: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, reason: str | None) -> None:
        """`reason` None: fused; else why not."""
        self.found[kind] += 1
        if reason is None:
            self.fused[kind] += 1
        else:
            self.reasons.setdefault(kind, reason)

    def __str__(self) -> str:
        parts = []
        for kind, found in self.found.items():
            text = f"{self.fused[kind]} of {found} {kind}"
            parts.append(text + (f" ({self.reasons[kind]})" if kind in self.reasons else ""))
        return "fused " + ", ".join(parts) if parts else "nothing to fuse: no known pattern"


@dataclass(frozen=True)
class Rotation:
    """What happens to queries and keys before attention. `cos` and `sin` are `[T, D]`."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float
    norm_style: int


def fuse(model: nn.Module, layout: KvLayout) -> Report:
    """Rewrite `model` in place. Call inside `torch.inference_mode`, on the device it will run on."""
    report = Report()
    norms = _fuse_norms(model, report)
    for module in model.modules():
        if _has(module, _Mlp.CHILDREN):
            report.add("MLPs", _try(partial(_fuse_mlp, module)))
        elif _has(module, _Attention.CHILDREN) and hasattr(module, "layer_idx"):
            report.add("attentions", _try(partial(_fuse_attention, module, norms, layout)))
    for container in list(model.modules()):
        for name, child in container.named_children():
            if isinstance(child, nn.ModuleList) and name == "layers":
                _fuse_layers(list(child), container, norms, report)
    return report


def _try(action: Callable[[], None]) -> str | None:
    """None when it worked, else the reason in a few words. Fusing is never worth a failed start."""
    try:
        action()
    except _Differs as exc:
        return str(exc)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as exc:
        return f"{type(exc).__name__}: {str(exc).splitlines()[0][:80]}"
    return None


class _Differs(Exception):
    """The rewritten module is not the original one."""


def _has(module: nn.Module, children: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in children)


def _require_close(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)
    if not float(error) <= _TOLERANCE[theirs.dtype]:
        raise _Differs(f"{what} differs by {float(error):.2g}")


def _random(size: int, like: torch.Tensor, num_tokens: int = _TEST_TOKENS) -> torch.Tensor:
    generator = torch.Generator(device=like.device).manual_seed(0)
    shape = (1, num_tokens, size)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def _install(
    module: nn.Module, forward: Callable[..., Any], same: Callable[[Callable[..., Any]], None]
) -> None:
    """Replace `forward` when `same(forward)` does not object."""
    same(forward)
    module.forward = forward


# --- norms -----------------------------------------------------------------------------------


class _Norm:
    """An RMSNorm, or the result that the layer before has prepared for it."""

    def __init__(self, module: nn.Module, eps: float, style: int) -> None:
        self.weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self.eps, self.style = eps, style
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def prepare(self, x: torch.Tensor, output: torch.Tensor) -> None:
        self._input, self._output = x, output

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        given, output = self._input, self._output
        self._input = self._output = None
        # Identity is safe: the input was kept alive until now.
        if output is not None and x is given:
            return output
        return kernels.rms_norm(x.contiguous(), self.weight, self.eps, self.style)


def _fuse_norms(model: nn.Module, report: Report) -> dict[nn.Module, _Norm]:
    norms: dict[nn.Module, _Norm] = {}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            report.add("norms", _try(partial(_fuse_norm, module, norms)))
    return norms


def _fuse_norm(module: nn.Module, norms: dict[nn.Module, _Norm]) -> None:
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        raise _Differs("it has other parameters than one weight")
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    weight = parameters["weight"]
    x = _random(weight.shape[0], weight)
    theirs = module(x)
    errors = {}
    for style in (kernels.CAST_THEN_SCALE, kernels.SCALE_THEN_CAST, kernels.ONE_PLUS_WEIGHT):
        ours = kernels.rms_norm(x, weight, eps, style)
        errors[style] = float((ours.float() - theirs.float()).norm())
    style = min(errors, key=lambda each: errors[each])
    norm = _Norm(module, eps, style)
    _install(module, norm, lambda forward: _require_close("a norm", forward(x), theirs))
    norms[module] = norm


# --- MLP -------------------------------------------------------------------------------------


def _join(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) of several linears as one; theirs become views of it."""
    if any(type(linear) is not nn.Linear for linear in linears):
        raise _Differs("a projection is not a plain linear layer")
    if len({linear.bias is None for linear in linears}) != 1:
        raise _Differs("only some projections have a bias")
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    for linear, part in zip(linears, torch.split(weight, sizes), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    return weight, bias


class _Mlp:
    """down(act(gate(x)) * up(x)) with gate and up as one matrix."""

    CHILDREN = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def __init__(self, module: Any, activation: str) -> None:
        self._weight, self._bias = _join([module.gate_proj, module.up_proj])
        self._down, self._activation = module.down_proj, activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        joint = kernels.linear(x, self._weight, self._bias)
        hidden = kernels.gated_activation(joint, self._activation)
        return kernels.linear(hidden, self._down.weight, self._down.bias)


def _fuse_mlp(module: Any) -> None:
    if type(module.gate_proj) is not nn.Linear or type(module.down_proj) is not nn.Linear:
        raise _Differs("its projections are not plain linear layers")
    x = _random(module.gate_proj.in_features, module.gate_proj.weight)
    theirs = module(x)
    gate = module.gate_proj(x)
    for activation in kernels.ACTIVATIONS:
        # A gate beside an up of ones is the activation alone.
        ours = kernels.gated_activation(torch.cat([gate, torch.ones_like(gate)], -1), activation)
        try:
            _require_close("the activation", ours, module.act_fn(gate))
        except _Differs:
            continue
        fused = _Mlp(module, activation)
        _install(module, fused, lambda f: _require_close("the MLP", f(x), theirs))
        return
    raise _Differs("no kernel for its activation")


# --- attention -------------------------------------------------------------------------------


class _Attention:
    """Projections as one matrix; norms, rotation and the write to the pool as one kernel."""

    CHILDREN = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(
        self,
        module: Any,
        q_norm: _Norm | None,
        k_norm: _Norm | None,
        options: AttentionOptions,
    ) -> None:
        self._module, self._q_norm, self._k_norm = module, q_norm, k_norm
        self._options = options
        self._weight, self._bias = _join([module.q_proj, module.k_proj, module.v_proj])
        self.dim: int = module.head_dim
        self.num_q_heads = module.q_proj.out_features // self.dim

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        kv_step: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        joint = kernels.linear(hidden_states, self._weight, self._bias)
        qkv = joint[0].view(hidden_states.shape[1], -1, self.dim)
        cos, sin = position_embeddings
        assert cos.shape[-1] == self.dim, "fused only where whole heads rotate"
        q_norm, k_norm = self._q_norm, self._k_norm
        rotation = Rotation(
            cos[0],
            sin[0],
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            -1 if q_norm is None else q_norm.style,
        )
        out = kv_step.attend_joint(
            self._module.layer_idx, qkv, self.num_q_heads, rotation, self._options
        )
        o_proj = self._module.o_proj
        return kernels.linear(out.reshape(1, len(qkv), -1), o_proj.weight, o_proj.bias), None


def _fuse_attention(module: Any, norms: dict[nn.Module, _Norm], layout: KvLayout) -> None:
    q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm not in norms):
        raise _Differs("its query and key norms are of no known kind")
    if q_norm is not None and q_norm.weight.shape[0] != module.head_dim:
        raise _Differs("its query and key norms span several heads")
    rope = getattr(module.config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _Differs("only a part of each head rotates")
    weight = module.q_proj.weight
    x = _random(module.q_proj.in_features, weight)
    angle = torch.linspace(0.1, 3.0, layout.head_dim // 2, device=x.device)
    angle = angle * torch.arange(1, _TEST_TOKENS + 1, device=x.device)[:, None]
    angle = torch.cat([angle, angle], -1)[None]
    rotation = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
    arguments: dict[str, Any] = {
        "hidden_states": x, "position_embeddings": rotation, "attention_mask": None
    }  # fmt: skip
    theirs = _Witness(layout, str(x.device))
    their_out = module(**arguments, kv_step=theirs)[0]
    assert theirs.options is not None
    fused = _Attention(
        module,
        None if q_norm is None else norms[q_norm],
        None if k_norm is None else norms[k_norm],
        theirs.options,
    )

    def same(forward: Callable[..., Any]) -> None:
        ours = _Witness(layout, str(x.device))
        our_out = forward(**arguments, kv_step=ours)[0]
        names = ("queries", "keys", "values")
        for what, mine, original in zip(names, ours.seen, theirs.seen, strict=True):
            _require_close(what, mine, original)
        _require_close("the output", our_out, their_out)

    _install(module, fused, same)


class _Witness:
    """Stands behind one attention layer and keeps what it was given, `[T, heads, D]` each.

    Its "attention" hands the queries back, so that the output projection is compared as well.
    """

    def __init__(self, layout: KvLayout, device: str) -> None:
        self._layout, self._device = layout, device
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
        self.seen = [x.transpose(0, 1).contiguous() for x in (query, key, value)]
        self.options = options
        return self.seen[0]

    def attend_joint(
        self,
        layer: int,
        qkv: torch.Tensor,
        num_q_heads: int,
        rotation: Rotation,
        options: AttentionOptions,
    ) -> torch.Tensor:
        layout = self._layout
        pool = KvPool(layout, layout.num_blocks(len(qkv)), self._device).tensor
        rows = layout.block_size + torch.arange(len(qkv), dtype=torch.int32, device=qkv.device)
        store(qkv, pool, rows, layer, num_q_heads, rotation)
        shape = (2, -1, layout.num_kv_heads, layout.head_dim)
        kept = pool[1:, layer].transpose(0, 1).reshape(shape)[:, : len(qkv)].to(qkv.dtype)
        self.seen = [qkv[:, :num_q_heads].contiguous(), kept[0], kept[1]]
        self.options = options
        return self.seen[0].reshape(len(qkv), -1)


def store(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    layer: int,
    num_q_heads: int,
    rotation: Rotation,
) -> None:
    """Rotate in place and keep keys and values, as `rotation` says."""
    kernels.rotate_and_store(
        qkv,
        pool,
        rows,
        layer,
        num_q_heads=num_q_heads,
        cos=rotation.cos,
        sin=rotation.sin,
        q_weight=rotation.q_weight,
        k_weight=rotation.k_weight,
        eps=rotation.eps,
        norm_style=rotation.norm_style,
    )


# --- layers ----------------------------------------------------------------------------------

_LAYER_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class _Layer:
    """Pre-norm attention and MLP. Each residual addition and the norm after it are one kernel,
    the last one together with the norm of the layer that follows."""

    def __init__(self, module: Any, norms: dict[nn.Module, _Norm]) -> None:
        self._module = module
        self._first = norms[module.input_layernorm]
        self._second = norms[module.post_attention_layernorm]
        self.following: _Norm | None = None

    def __call__(self, hidden_states: torch.Tensor, *_: Any, **arguments: Any) -> torch.Tensor:
        module, second, following = self._module, self._second, self.following
        residual = hidden_states.contiguous()
        attended, _weights = module.self_attn(
            hidden_states=module.input_layernorm(hidden_states), **arguments
        )
        residual, normed = kernels.add_rms_norm(
            attended, residual, second.weight, second.eps, second.style
        )
        out: torch.Tensor = module.mlp(normed)
        if following is None:
            return residual + out
        out, normed = kernels.add_rms_norm(
            out, residual, following.weight, following.eps, following.style
        )
        following.prepare(out, normed)
        return out


def _fuse_layers(
    layers: list[Any], container: nn.Module, norms: dict[nn.Module, _Norm], report: Report
) -> None:
    finals = [norms[m] for _, m in container.named_children() if m in norms]
    fused: dict[int, _Layer] = {}
    for index, layer in enumerate(layers):
        if not _has(layer, _LAYER_CHILDREN):
            report.add("layers", "other children than a pre-norm layer has")
            continue
        report.add("layers", _try(partial(_fuse_layer, layer, norms, fused, index)))
    for index, layer in fused.items():
        if index + 1 in fused:
            layer.following = norms[layers[index + 1].input_layernorm]
        elif index + 1 == len(layers) and len(finals) == 1:
            layer.following = finals[0]


def _fuse_layer(
    module: Any, norms: dict[nn.Module, _Norm], fused: dict[int, _Layer], index: int
) -> None:
    others = {name for name, _ in module.named_children()} - set(_LAYER_CHILDREN)
    if others:
        raise _Differs(f"it has {', '.join(sorted(others))} as well")
    if not {module.input_layernorm, module.post_attention_layernorm} <= set(norms):
        raise _Differs("its norms are not fused")
    weight = norms[module.input_layernorm].weight
    x = _random(weight.shape[0], weight)
    original = module.self_attn.forward
    # Attention was compared by itself: here a stand-in that keeps the shape.
    module.self_attn.forward = lambda hidden_states, **_: (hidden_states.flip(-1), None)
    try:
        theirs = _first(module(x, position_embeddings=None))
        layer = _Layer(module, norms)
        _install(module, layer, lambda f: _require_close("the layer", f(x), theirs))
    finally:
        module.self_attn.forward = original
    fused[index] = layer


def _first(out: Any) -> torch.Tensor:
    if not isinstance(out, torch.Tensor):
        raise _Differs("a layer returns more than its hidden states")
    return out
