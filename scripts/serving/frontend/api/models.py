"""`/v1/models`: the one model that this deployment serves."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import ServingError
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.state import AppState
from serving.frontend.http.replies import error_response, json_response
from serving.frontend.model import check_model
from serving.protocol import ModelCard


def model_routes(state: AppState) -> list[Route]:
    def describe() -> dict[str, Any]:
        return describe_model(state.model_name, state.card, state.started)

    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": [describe()]})

    async def get_model(request: Request) -> Response:
        try:
            check_model(request.path_params["id"], state.model_name)
        except ServingError as exc:
            return error_response(to_api_error(exc))
        return json_response(describe())

    return [Route("/v1/models", list_models), Route("/v1/models/{id:path}", get_model)]


def describe_model(name: str, card: ModelCard | None, started: int) -> dict[str, Any]:
    """OpenAI's model object. `started` (Unix seconds) stands in until a worker has registered."""
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
