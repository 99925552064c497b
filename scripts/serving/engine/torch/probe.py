"""The shape of a model's KV, learned from one forward pass: config fields differ between models."""

from __future__ import annotations

import torch

from serving.engine.torch.attention import AttentionOptions
from serving.errors import ModelError, OperatorError
from serving.kv_layout import KvLayout


class Probe:
    """Stands behind the attention layers once and notes the shapes of keys and values."""

    def __init__(self) -> None:
        # Per layer: (heads, head size) of keys and of values; 0 where they are a part of the keys.
        self._shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
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

        Raises ModelError when the layers do not all keep keys and values of one shape, OperatorError
        when they do not keep them in this type.
        """
        shapes = set(self._shapes.values())
        layers = sorted(self._shapes)
        if len(shapes) != 1 or layers != list(range(len(layers))):
            raise ModelError(
                f"attention layers {layers} with key and value shapes {sorted(shapes, key=str)}: "
                "only models whose layers all keep keys and values of one shape can be paged",
                remedy="choose another model",
            )
        (key_heads, key_dim), value_shape = shapes.pop()
        if value_shape[1] and (key_heads, key_dim) != value_shape:
            raise ModelError("keys and values differ in shape", remedy="choose another model")
        dtype = kv_cache_dtype
        if dtype == "auto":
            dtype = str(self._dtype).removeprefix("torch.")
        if not value_shape[1] and dtype.startswith("float8"):
            raise OperatorError(
                "`engine.kv_cache_dtype`: this model keeps latents, which float8 is too coarse for",
                remedy="set engine.kv_cache_dtype to auto or bfloat16",
            )
        num_planes = 2 if value_shape[1] else 1
        return KvLayout(len(layers), key_heads, key_dim, block_size, dtype, num_planes)
