"""Sample inputs for the layer rewrite, and a recorder that stands in for attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.rewrite.mechanism import Differs, Observation

NUM_TOKENS = 5


def sample_states(width: int, like: torch.Tensor) -> torch.Tensor:
    """Random hidden states `[1, NUM_TOKENS, width]`, on the device and in the dtype of `like`."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    shape = (1, NUM_TOKENS, width)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def sample_rotation(head_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as transformers gives them to layers: `[1, NUM_TOKENS, head_dim]` each."""
    angle = torch.linspace(0.1, 3.0, head_dim // 2, device=like.device)
    angle = angle * torch.arange(1, NUM_TOKENS + 1, device=like.device)[:, None]
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class AttentionRecorder:
    """Stands behind one attention layer and keeps what it is given, `[T, heads, D]` each.

    Its "attention" hands the queries back, so that the output projection is compared as well.
    """

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self.options: AttentionOptions | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """See `attention.AttentionStep`."""
        query, key, value = (each.transpose(0, 1).contiguous() for each in (query, key, value))
        return self.record(query, key, value, options)

    def record(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.seen = {"its queries": query, "its keys": key, "its values": value}
        self.options = options
        return query

    def observation(self, output: Any) -> Observation:
        """With the module's `output`. Raises Differs when no attention was seen."""
        if self.options is None:
            raise Differs("it has no attention that could be recorded")
        return Observation({**self.seen, "its output": states_of(output)}, self.options)


def states_of(output: Any) -> torch.Tensor:
    """Raises Differs when a layer returns more than its hidden states."""
    if not isinstance(output, torch.Tensor):
        raise Differs("it returns more than its hidden states")
    return output


def has_children(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether all of `names` are modules within it; it may have others."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def require_children(what: str, module: nn.Module, names: tuple[str, ...]) -> None:
    """Raises Differs unless a module has these children and no others."""
    found = {name for name, _ in module.named_children()}
    if found != set(names):
        differing = ", ".join(sorted(found ^ set(names)))
        raise Differs(f"its {what} has other children than the usual ones: {differing}")
