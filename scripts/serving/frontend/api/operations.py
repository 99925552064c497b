"""Routes for operators and their tools: health, readiness and metrics."""

from __future__ import annotations

from importlib import metadata

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import ServingError
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.state import AppState
from serving.frontend.http.replies import error_response, json_response
from serving.frontend.metrics.pages import OWN_PATH, join_pages
from serving.frontend.metrics.registry import CONTENT_TYPE
from serving.frontend.served.readiness import readiness


def _version() -> str:
    try:
        return metadata.version("snakemake-serving")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def operations_routes(state: AppState) -> list[Route]:
    async def health(request: Request) -> Response:
        return json_response({"status": "ok", "launch_id": state.launch_id})

    async def ready(request: Request) -> Response:
        try:
            content = await readiness(state.models, request.query_params.get("model"))
        except ServingError as exc:
            return error_response(to_api_error(exc))
        if state.slot is not None:
            content["process"] = state.slot.number
        return json_response(content, 200 if content["ready"] else 503)

    async def metrics(request: Request) -> Response:
        page = state.models.metrics_page()
        if state.slot is not None:
            authorization = request.headers.get("authorization", "")
            peer_ports = state.slot.peer_ports()
            page = await join_pages(page, state.slot.number, peer_ports, authorization)
        return Response(page, media_type=CONTENT_TYPE)

    async def own_metrics(request: Request) -> Response:
        return Response(state.models.metrics_page(), media_type=CONTENT_TYPE)

    async def version(request: Request) -> Response:
        return json_response({"version": _version()})

    async def load(request: Request) -> Response:
        return json_response({"server_load": state.models.num_in_flight()})

    async def root(request: Request) -> Response:
        return json_response(
            {
                "service": "snakemake-serving",
                "model": state.models.title,
                "api": [
                    *("/v1/chat/completions", "/v1/responses", "/v1/messages"),
                    *("/v1/completions", "/v1/models", "/tokenize"),
                ],
                "status": ["/health", "/ready", "/metrics"],
            }
        )

    return [
        Route("/", root),
        Route("/version", version),
        Route("/load", load),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route(OWN_PATH, own_metrics),
    ]
