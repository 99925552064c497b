"""The shape of a model's KV, learned from one forward pass: config fields differ between models.

Layers that share the KV of others are known by this: they attend to the very tensors that an
earlier layer attended to.
"""

from __future__ import annotations

import torch

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.kv.pool import LayerKv
from serving.errors import ModelError, OperatorError
from serving.kv_layout import KvGroup, KvLayout


class Probe:
    """Stands behind the attention layers once and notes the shapes of keys and values."""

    keeps_tensors = True
    """So that a tensor that lies where an earlier one lay is the same one."""

    def __init__(self) -> None:
        # Per layer: (heads, head size) of keys and of values; 0 where they are a part of the keys.
        self._shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._tensors: dict[tuple[int, int], tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._sources: dict[int, int] = {}  # by layer: the one whose KV it reads
        self._dtype = torch.float32

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `attention.AttentionStep`. Hands the queries back."""
        if layer in self._shapes:
            raise ModelError(
                f"layer {layer} attends more than once for a token",
                remedy="use `engine.backend: tensorrt_llm` on GPUs, or another model",
            )
        self._dtype = key.dtype
        if self.keeps_tensors:
            place = (key.data_ptr(), value.data_ptr())
            source, *_ = self._tensors.setdefault(place, (layer, key, value))
            if source != layer:
                self._sources[layer] = source
        if latent := options.latent:
            if options[1:4] != (None, None, None):
                raise ModelError(
                    "the torch engine cannot run this model: its latent attention has windows, "
                    "caps or sinks",
                    remedy="choose another model",
                )
            self._shapes[layer] = ((1, latent.kept_dim), (1, 0))
            return query.new_zeros((query.shape[1], latent.num_heads, latent.value_dim))
        self._shapes[layer] = ((key.shape[0], key.shape[2]), (value.shape[0], value.shape[2]))
        return query.transpose(0, 1)

    def layout(self, block_size: int, kv_cache_dtype: str) -> KvLayout:
        """The layout of a pool. `kv_cache_dtype` `auto`: the dtype that the model computes in.

        Raises ModelError when layers keep KV that cannot be paged, OperatorError when they do not
        keep it in this type.
        """
        groups = self._groups()
        for (key_heads, _), (value_heads, value_dim) in groups:
            if key_heads != value_heads or (not value_dim and len(groups) > 1):
                raise ModelError(
                    f"attention layers keep keys and values of the shapes {sorted(groups)}: keys and "
                    "values must have equally many heads, and all layers latents or none",
                    remedy="choose another model",
                )
        dtype = kv_cache_dtype
        if dtype == "auto":
            dtype = str(self._dtype).removeprefix("torch.")
        if any(not value_dim for _, (_, value_dim) in groups) and dtype.startswith("float8"):
            raise OperatorError(
                "`engine.kv_cache_dtype`: this model keeps latents, which float8 is too coarse for",
                remedy="set engine.kv_cache_dtype to auto or bfloat16",
            )
        return KvLayout(
            tuple(
                KvGroup(len(layers), heads, key_dim, value_dim)
                for ((heads, key_dim), (_, value_dim)), layers in groups.items()
            ),
            block_size,
            dtype,
        )

    def layers(self) -> dict[int, LayerKv]:
        """By a layer's number in the model: where its KV is in a block of `layout`."""
        owners = [layer for layers in self._groups().values() for layer in layers]
        found = {layer: LayerKv(row) for row, layer in enumerate(owners)}
        for layer, source in self._sources.items():
            found[layer] = LayerKv(found[source].row, writes=False)
        return found

    def _groups(self) -> dict[tuple[tuple[int, int], tuple[int, int]], list[int]]:
        """Layers that keep KV, by the shapes of it."""
        groups: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
        for layer in sorted(self._shapes):
            if layer not in self._sources:
                groups.setdefault(self._shapes[layer], []).append(layer)
        return groups
