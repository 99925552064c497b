"""`/v1/models`: the one model this deployment serves."""

from __future__ import annotations

from typing import Any

from serving.errors import ModelNotFound
from serving.protocol import ModelCard


def describe_model(name: str, card: ModelCard | None, started: int) -> dict[str, Any]:
    """OpenAI's model object. `started` (Unix seconds) stands in until a worker registered."""
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": card.created if card else started,
        "owned_by": "serving",
    }
    if card:
        model["max_model_len"] = card.max_model_len
        if card.dummy_weights:
            model["dummy_weights"] = True  # answers are noise
    return model


def check_model(asked: str, served: str) -> None:
    """Raises ModelNotFound."""
    if asked != served:
        raise ModelNotFound(
            f"The model `{asked[:200]}` is not served here; `{served}` is",
            param="model",
            code="model_not_found",
        )
