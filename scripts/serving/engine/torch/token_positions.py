"""Positions for attention layers that count tokens themselves.

Llama 4's layers without rotary positions scale their queries by how far they are in the prompt, and
take that from the length of transformers' cache. Steps here have no such cache, and the tokens of
several sequences stand in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def give_positions(model: Any) -> None:
    """Layers of `model` that scale queries by their position go by `position_ids` from now on."""
    layers = [
        module
        for module in model.modules()
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")
    ]
    if layers:
        positions = _StepPositions()
        model.register_forward_pre_hook(positions.take, with_kwargs=True)
        for layer in layers:
            layer.forward = positions.behind(layer.forward)


class _StepPositions:
    """Stands for the cache of a forward pass where a layer asks it for a length.

    The layer adds 0, 1, 2, ... to the length. The differences to the positions make it right.
    """

    def __init__(self) -> None:
        self._offsets: torch.Tensor | int = 0

    def take(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions: torch.Tensor = kwargs["position_ids"][0]
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def behind(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def with_positions(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **{**kwargs, "past_key_values": self})

        return with_positions

    def get_seq_length(self, _: int) -> torch.Tensor | int:
        return self._offsets

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value
