"""The shapes of a model's KV as its config states them; `logits_check` proves them right."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from serving.kv_layout import KvGroup, KvLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def kv_layout(config: PreTrainedConfig, block_size: int, dtype: str) -> KvLayout:
    """Groups are in the order of their first layers. `num_kv_shared_layers` are the last layers of
    a model, which keep no KV of their own."""
    num_layers: int = config.num_hidden_layers
    if rank := getattr(config, "kv_lora_rank", None):
        kept_dim = rank + config.qk_rope_head_dim
        return KvLayout.uniform(num_layers, 1, kept_dim, block_size, dtype, num_planes=1)
    plain: Any = config
    num_keeping = num_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    if getattr(config, "is_heterogeneous", False):
        shapes = [_shape(plain.per_layer_config[i]) for i in range(num_keeping)]
    else:
        shapes = [_shape(config)] * num_keeping
    groups = (KvGroup(count, heads, dim, dim) for (heads, dim), count in Counter(shapes).items())
    return KvLayout(tuple(groups), block_size, dtype)


def _shape(config: Any) -> tuple[int, int]:
    """KV heads and their size."""
    num_heads = config.num_attention_heads
    return (
        getattr(config, "num_key_value_heads", None) or num_heads,
        getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )
