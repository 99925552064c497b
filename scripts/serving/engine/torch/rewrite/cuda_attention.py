"""Attention layers on CUDA: projections as one matrix; norms, rotation and the write to the pool as
one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.cuda.kernels.linear import linear
from serving.engine.torch.cuda.kernels.rotary import Rotation, rotate_and_store
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.rewrite.cuda_mlp import join
from serving.engine.torch.rewrite.cuda_norm import CUDA_TOLERANCES, FusedNorm, fused_norm
from serving.engine.torch.rewrite.mechanism import Differs, Forward, Observation, Pattern
from serving.engine.torch.rewrite.samples import (
    AttentionRecorder,
    has_children,
    sample_rotation,
    sample_states,
)
from serving.kv_layout import KvLayout

_NORMS = ("q_norm", "k_norm")


class AttentionPattern(Pattern):
    """Attention whose heads rotate whole, with or without norms of queries and keys."""

    kind = "attentions"
    tolerances = CUDA_TOLERANCES

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout

    def candidates(self, model: nn.Module) -> Iterable[nn.Module]:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return [
            module
            for module in model.modules()
            if has_children(module, names) and hasattr(module, "layer_idx")
        ]

    def require_match(self, module: Any) -> None:
        norms = [norm for name in _NORMS if (norm := getattr(module, name, None)) is not None]
        fused = [fused_norm(norm) for norm in norms]
        if len(norms) == 1 or None in fused:
            raise Differs("its query and key norms are of no known kind")
        if any(norm.weight.shape[0] != module.head_dim for norm in norms):
            raise Differs("its query and key norms span several heads")
        rope = getattr(module.config, "rope_parameters", None) or {}
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise Differs("only a part of each head rotates")

    def observe(self, module: Any, forward: Forward) -> Observation:
        weight = module.q_proj.weight
        recorder = _PoolRecorder(self._layout)
        output = forward(
            hidden_states=sample_states(module.q_proj.in_features, weight),
            position_embeddings=sample_rotation(self._layout.head_dim, weight),
            attention_mask=None,
            kv_step=recorder,
        )
        return recorder.observation(output[0])

    def replacement(self, module: Any, original: Observation) -> Forward:
        assert original.options is not None, "its attention was recorded"
        norms = [fused_norm(getattr(module, name, None)) for name in _NORMS]
        return _FusedAttention(module, norms[0], norms[1], original.options)


class _FusedAttention:
    def __init__(
        self,
        module: Any,
        q_norm: FusedNorm | None,
        k_norm: FusedNorm | None,
        options: AttentionOptions,
    ) -> None:
        self._module, self._q_norm, self._k_norm = module, q_norm, k_norm
        self._options = options
        self._weight, self._bias = join([module.q_proj, module.k_proj, module.v_proj])
        self._dim: int = module.head_dim
        self._num_q_heads = module.q_proj.out_features // self._dim

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        kv_step: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        joint = linear(hidden_states, self._weight, self._bias)
        qkv = joint[0].view(hidden_states.shape[1], -1, self._dim)
        cos, sin = position_embeddings
        assert cos.shape[-1] == self._dim, "replaced only where whole heads rotate"
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
            self._module.layer_idx, qkv, self._num_q_heads, rotation, self._options
        )
        o_proj = self._module.o_proj
        return linear(out.reshape(1, len(qkv), -1), o_proj.weight, o_proj.bias), None


class _PoolRecorder(AttentionRecorder):
    """Records what the replacement writes to a pool as well; see `cuda.step.CudaStep`."""

    def __init__(self, layout: KvLayout) -> None:
        super().__init__()
        self._layout = layout

    def attend_joint(
        self,
        layer: int,
        qkv: torch.Tensor,
        num_q_heads: int,
        rotation: Rotation,
        options: AttentionOptions,
    ) -> torch.Tensor:
        layout = self._layout
        pool = KvPool(layout, layout.num_blocks(len(qkv)), str(qkv.device)).tensor
        rows = layout.block_size + torch.arange(len(qkv), dtype=torch.int32, device=qkv.device)
        rotate_and_store(qkv, pool, rows, layer, num_q_heads, rotation)
        shape = (2, -1, layout.num_kv_heads, layout.head_dim)
        kept = pool[1:, layer].transpose(0, 1).reshape(shape)[:, : len(qkv)].to(qkv.dtype)
        return self.record(qkv[:, :num_q_heads].contiguous(), kept[0], kept[1], options)
