"""`/v1/models`: what this deployment serves, under all of its names."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import ServingError
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.state import AppState
from serving.frontend.http.replies import error_response, json_response
from serving.frontend.served.model import ServedModel
from serving.protocol import ModelCard


def model_routes(state: AppState) -> list[Route]:
    async def describe(name: str, served: ServedModel) -> dict[str, Any]:
        model = describe_model(name, served.card, state.started)
        if name != served.name:
            model["root"] = served.name
        with suppress(ServingError):  # without a tokenizer, nothing is known of its answers
            loaded = await served.load()
            model.update(loaded.preprocessor.answer_format.describe())
        return model

    async def list_models(request: Request) -> Response:
        data = [await describe(name, served) for served in state.models for name in served.names]
        return json_response(
            {
                "object": "list",
                "data": data,
                "has_more": False,
                "first_id": data[0]["id"],
                "last_id": data[-1]["id"],
            }
        )

    async def get_model(request: Request) -> Response:
        name = request.path_params["id"]
        try:
            served = state.models.find(name)
        except ServingError as exc:
            return error_response(to_api_error(exc))
        return json_response(await describe(name, served))

    return [Route("/v1/models", list_models), Route("/v1/models/{id:path}", get_model)]


def _iso_time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_model(name: str, card: ModelCard | None, started: int) -> dict[str, Any]:
    """OpenAI's model object. `started` (Unix seconds) stands in until a worker has registered."""
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "type": "model",  # from here to `created_at`: Anthropic's
        "display_name": name,
        "created_at": _iso_time(card.created if card else started),
        "created": card.created if card else started,
        "owned_by": "serving",
    }
    if card:
        model["max_model_len"] = card.max_model_len
        model["max_input_tokens"] = card.max_model_len
        if card.dummy_weights:
            model["dummy_weights"] = True  # answers are noise
        if card.text_of:
            model["text_only"] = msgspec.to_builtins(card.text_of)
    return model
