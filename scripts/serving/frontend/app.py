"""The HTTP routes: OpenAI's API, health, readiness and metrics. Behind them is a `Pipeline`."""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from serving.config import FrontendConfig
from serving.errors import ServingError
from serving.frontend.api.call import CHAT, COMPLETIONS, AppState, CompletionRoute
from serving.frontend.api.errors import ApiError, routing_error, to_api_error
from serving.frontend.api.limits import InFlight
from serving.frontend.api.models import check_model, describe_model
from serving.frontend.metrics.pages import OWN_PATH, joined
from serving.frontend.metrics.registry import CONTENT_TYPE, Metrics
from serving.frontend.model import ModelLoader
from serving.frontend.pipeline import Pipeline
from serving.frontend.process_group import ProcessSlot


class App(Starlette):
    """Completions go straight to their routes; all else, wrong methods too, is Starlette's.

    Its middleware and its wrapping of `send` cost more than routing a request by KV.
    """

    def __init__(self, completions: dict[str, ASGIApp], **more: Any) -> None:
        super().__init__(**more)
        self._completions = completions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._completions.get(scope["path"])
            if route is not None:
                await route(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def create_app(
    pipeline: Pipeline,
    *,
    config: FrontendConfig,
    metrics: Metrics,
    model_name: str,
    launch_id: str = "",
    slot: ProcessSlot | None = None,
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """The whole HTTP side. `launch_id` tells whoever started this process that it is the one,
    `slot` which of several it is."""
    started = int(time.time())
    models = ModelLoader()
    parts = AppState(
        pipeline=pipeline,
        metrics=metrics,
        in_flight=InFlight(config.max_inflight, metrics.in_flight),
        models=models,
        model_name=model_name,
        max_body_bytes=config.max_body_bytes,
    )

    async def health(request: Request) -> Response:
        return json_response({"status": "ok", "launch_id": launch_id})

    async def ready(request: Request) -> Response:
        is_ready, reason = pipeline.ready()
        if is_ready:
            try:  # ready means that the first request will not wait for the tokenizer
                await models.load(pipeline.card)
            except ServingError as exc:
                is_ready, reason = False, str(exc)
        content = {"ready": is_ready, "reason": reason, **pipeline.describe()}
        if slot is not None:
            content["process"] = slot.number
        return json_response(content, 200 if is_ready else 503)

    async def metrics_page(request: Request) -> Response:
        page = metrics.render()
        if slot is not None:
            key = request.headers.get("authorization", "")
            page = await joined(page, slot.number, slot.peer_ports(), key)
        return Response(page, media_type=CONTENT_TYPE)

    async def own_metrics(request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    async def list_models(request: Request) -> Response:
        model = describe_model(model_name, pipeline.card, started)
        return json_response({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        try:
            check_model(request.path_params["id"], model_name)
        except ServingError as exc:
            return error_response(to_api_error(exc))
        return json_response(describe_model(model_name, pipeline.card, started))

    completions: dict[str, ASGIApp] = {
        "/v1/chat/completions": CompletionRoute(CHAT, parts),
        "/v1/completions": CompletionRoute(COMPLETIONS, parts),
    }
    return App(
        completions,
        routes=[
            *(Route(path, route, methods=["POST"]) for path, route in completions.items()),
            Route("/v1/models", list_models),
            Route("/v1/models/{id:path}", one_model),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics_page),
            Route(OWN_PATH, own_metrics),
        ],
        exception_handlers={HTTPException: _on_routing_error, Exception: _on_failure},
        lifespan=lifespan,
    )


async def _on_routing_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    response = error_response(routing_error(exc.status_code, request.method, request.url.path))
    response.headers.update(exc.headers or {})  # Allow
    return response


async def _on_failure(request: Request, exc: Exception) -> Response:
    return error_response(to_api_error(exc))


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, media_type="application/json")
