"""Decoder layers on CUDA: each residual addition is one kernel with the norm that follows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.cuda.kernels.norm import add_rms_norm
from serving.engine.torch.rewrite.cuda_attention import AttentionPattern
from serving.engine.torch.rewrite.cuda_mlp import MlpPattern
from serving.engine.torch.rewrite.cuda_norm import (
    CUDA_TOLERANCES,
    FusedNorm,
    NormPattern,
    fused_norm,
)
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
    has_children,
    require_children,
    sample_states,
    states_of,
)
from serving.kv_layout import KvLayout

_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def rewrite_for_cuda(model: nn.Module, layout: KvLayout) -> RewriteReport:
    """Rewrite `model` in place: norms first, then what contains them."""
    patterns = [NormPattern(), MlpPattern(), AttentionPattern(layout), CudaLayerPattern()]
    report = rewrite(model, patterns)
    for container in list(model.modules()):
        layers = getattr(container, "layers", None)
        if isinstance(layers, nn.ModuleList):
            finals = [norm for child in container.children() if (norm := fused_norm(child))]
            _link(list(layers), finals)
    return report


class CudaLayerPattern(Pattern):
    """Pre-norm attention and MLP, whose norms were replaced."""

    kind = "layers"
    tolerances = CUDA_TOLERANCES

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        return decoder_layers(model)

    def require_match(self, module: Any) -> None:
        if not has_children(module, _CHILDREN):
            raise Differs("other children than a pre-norm layer has")
        require_children("layer", module, _CHILDREN)
        if not (fused_norm(module.input_layernorm) and fused_norm(module.post_attention_layernorm)):
            raise Differs("its norms were not replaced")

    def observe(self, module: Any, forward: Forward) -> Observation:
        weight = module.input_layernorm.weight
        original = module.self_attn.forward
        # Attention was compared by itself: here a stand-in that keeps the shape.
        module.self_attn.forward = lambda hidden_states, **_: (hidden_states.flip(-1), None)
        try:
            output = forward(sample_states(weight.shape[0], weight), position_embeddings=None)
        finally:
            module.self_attn.forward = original
        return Observation({"its output": states_of(output)})

    def replacement(self, module: Any, original: Observation) -> Forward:
        return _FusedLayer(module)


class _FusedLayer:
    """The last residual addition is one kernel with the norm of the layer that follows."""

    def __init__(self, module: Any) -> None:
        self._module = module
        second = fused_norm(module.post_attention_layernorm)
        assert second is not None, "the pattern requires it"
        self._second = second
        self.following: FusedNorm | None = None

    def __call__(self, hidden_states: torch.Tensor, *_: Any, **arguments: Any) -> torch.Tensor:
        module, second, following = self._module, self._second, self.following
        residual = hidden_states.contiguous()
        attended, _weights = module.self_attn(
            hidden_states=module.input_layernorm(hidden_states), **arguments
        )
        residual, normed = add_rms_norm(attended, residual, second.weight, second.eps, second.style)
        out: torch.Tensor = module.mlp(normed)
        if following is None:
            return residual + out
        out, normed = add_rms_norm(out, residual, following.weight, following.eps, following.style)
        following.prepare(out, normed)
        return out


def _link(layers: list[Any], finals: list[FusedNorm]) -> None:
    """Give each replaced layer the norm that follows it: the next layer's, or the final one."""
    for index, layer in enumerate(layers):
        if not isinstance(layer.forward, _FusedLayer):
            continue
        if index + 1 < len(layers):
            if isinstance(layers[index + 1].forward, _FusedLayer):
                layer.forward.following = fused_norm(layers[index + 1].input_layernorm)
        elif len(finals) == 1:
            layer.forward.following = finals[0]
