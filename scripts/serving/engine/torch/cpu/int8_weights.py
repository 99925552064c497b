"""A model whose linear layers are stored as int8, and the file that holds it.

Each row of a weight has a scale of its own: `weight[n] = scale[n] * int8[n]`. An input embedding
that is tied to the head shares the head's numbers. Everything else (norms, biases, other
embeddings, weights that are not in linear layers) stays float32, and so do activations and KV.
How such layers are computed quickly is `packed_linear`'s business; here they compute plainly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as read_into
from safetensors.torch import save_model as write_from
from torch import nn

from serving.errors import ModelError

# Not the name that transformers looks for: it would take the numbers for the weights.
FILE = "model-int8.safetensors"

_LARGEST = 127  # symmetric, so that negation is exact


class Int8Linear(nn.Module):
    """`x @ (scale * weight).T + bias`; `weight` is int8 `[out_features, in_features]`."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def plain_weight(self) -> torch.Tensor:
        return self.weight.float() * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.plain_weight(), self.bias)


class Int8Embedding(nn.Module):
    """Rows of an int8 `[vocab_size, dim]` table, as float32."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].float() * self.scale[ids, None]


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest int8 numbers and the scale of each row, for a float32 `[N, K]`."""
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def quantize(model: nn.Module) -> float:
    """Replace the linear layers of a float32 model in place; returns their share of its weights.

    Raises ModelError when there is none.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        for parent, name, child in list(_linears(model)):
            at = child.weight.data_ptr()
            made.setdefault(at, quantize_rows(child.weight))
            setattr(parent, name, Int8Linear(*made[at], child.bias))
        for parent, name, table in list(_embeddings(model)):
            if table.weight.data_ptr() in made:
                setattr(parent, name, Int8Embedding(*made[table.weight.data_ptr()]))
    if not made:
        raise ModelError(
            "the model has no linear layers that could be stored as int8",
            remedy="set `engine.dtype` to float32",
        )
    return sum(weight.numel() for weight, _ in made.values()) / total


def save(model: nn.Module, folder: Path) -> None:
    """Write config.json and `FILE` of a quantized model."""
    saved: Any = model
    saved.config.dtype = torch.float32  # what it computes in
    saved.config.save_pretrained(folder)
    write_from(model, str(folder / FILE))


def load(folder: Path, attention: str | None = None) -> nn.Module:
    """The model of an engine folder, ready to evaluate. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from serving.engine.torch.weights.multimodal.text_class import with_text_class

    auto: Any = AutoModelForCausalLM
    how = {} if attention is None else {"attn_implementation": attention}
    try:
        config = with_text_class(AutoConfig.from_pretrained(folder, local_files_only=True))
        with no_init_weights():
            # Its float32 weights are never touched, so they take addresses, not memory.
            model: nn.Module = auto.from_config(config, dtype=torch.float32, **how)
        _make_room(model, tied=bool(config.get_text_config().tie_word_embeddings))
        read_into(model, str(folder / FILE))
    except Exception as exc:  # transformers and safetensors raise whatever they meet
        raise ModelError(
            f"{folder} does not load: {exc}", remedy="rebuild the engine folder"
        ) from exc
    return model.eval()


def _make_room(model: nn.Module, *, tied: bool) -> None:
    """Replace what `quantize` replaces by layers of the same shapes, to be read into."""
    model_: Any = model
    embedding = model_.get_input_embeddings()
    head = model_.get_output_embeddings()
    rooms: dict[nn.Module, Int8Linear] = {}
    for parent, name, child in list(_linears(model)):
        weight = torch.empty(child.weight.shape, dtype=torch.int8)
        bias = None if child.bias is None else torch.empty_like(child.bias)
        rooms[child] = Int8Linear(weight, torch.empty(len(weight)), bias)
        setattr(parent, name, rooms[child])
    if tied and head in rooms and type(embedding) is nn.Embedding:
        model_.set_input_embeddings(Int8Embedding(rooms[head].weight, rooms[head].scale))


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def _embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Embedding]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Embedding:
                yield parent, name, child
