"""How many tokens a model can attend to, decided from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_max_len(config: PreTrainedConfig) -> int | None:
    """The model's own limit, prompt plus completion; None when the config has none.

    `max_position_embeddings` counts positions after their scaling, as transformers means it. Yarn
    is the exception: models are published with the limit before scaling, and transformers then
    goes by the factor. Beyond the original length of `longrope`, a longer prompt changes the
    positions of all its tokens, also of those whose KV other prompts share: it ends there.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") == "longrope" and each.get("original_max_position_embeddings"):
            return min(limit, int(each["original_max_position_embeddings"]))
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and factor and original:
        return max(limit, int(factor * original))
    return limit
