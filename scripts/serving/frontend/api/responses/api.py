"""`/v1/responses`: create, stream, fetch and delete."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import InvalidRequest, ServingError
from serving.frontend.api.answer import BasicSampling, prepare_answer
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.responses.echo import check_encodable, echoed_fields
from serving.frontend.api.responses.request import ResponsesRequest, conversation, parse
from serving.frontend.api.responses.store import ResponseStore, StoredResponse
from serving.frontend.api.responses.writer import ResponsesWriter
from serving.frontend.http.replies import error_response, json_response
from serving.frontend.model import LoadedModel


def responses_api(store: ResponseStore) -> CompletionApi[ResponsesRequest]:
    async def prepare(
        request: ResponsesRequest, model: LoadedModel, request_id: str
    ) -> CompletionPlan:
        """Raises InvalidRequest."""
        if request.background:
            raise InvalidRequest(
                "`background` is not supported; stream the response instead",
                param="background",
                code="unsupported_parameter",
            )
        earlier = []
        if request.previous_response_id is not None:
            earlier = store.history(request.previous_response_id)
        own = request.input_items()
        asked, ignored = conversation(request, [*earlier, *own])
        samples = await prepare_answer(
            BasicSampling(temperature=request.temperature, top_p=request.top_p),
            asked,
            model,
            request_id,
            max_tokens=request.max_output_tokens,
            cut_to_context=True,
            session=request.prompt_cache_key or request.user,
        )

        def save(response: dict[str, Any]) -> bool:
            stored = StoredResponse(response, own, request.previous_response_id)
            return store.put(request_id, stored)

        keeps = store.is_enabled and request.store is not False
        echo = echoed_fields(request, keeps)
        check_encodable([echo, own])
        writer = ResponsesWriter(request_id, echo, save if keeps else None)
        return CompletionPlan(
            samples=samples, writer=writer, stream=bool(request.stream), ignored=tuple(ignored)
        )

    return CompletionApi("responses", "resp_", parse, prepare)


def responses_routes(store: ResponseStore) -> list[Route]:
    """Of stored responses."""

    async def get(request: Request) -> Response:
        try:
            return json_response(store.get(request.path_params["id"]).response)
        except ServingError as exc:
            return error_response(to_api_error(exc))

    async def delete(request: Request) -> Response:
        response_id = request.path_params["id"]
        try:
            store.delete(response_id)
        except ServingError as exc:
            return error_response(to_api_error(exc))
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(request: Request) -> Response:
        try:
            store.get(request.path_params["id"])
            raise InvalidRequest(
                "Only responses in the background can be cancelled; close the stream"
            )
        except ServingError as exc:
            return error_response(to_api_error(exc))

    async def input_items(request: Request) -> Response:
        try:
            items = store.get(request.path_params["id"]).input
        except ServingError as exc:
            return error_response(to_api_error(exc))
        items = [{"id": f"item_{index}", **item} for index, item in enumerate(items)]
        return json_response(
            {
                "object": "list",
                "data": items,
                "first_id": items[0]["id"] if items else None,
                "last_id": items[-1]["id"] if items else None,
                "has_more": False,
            }
        )

    return [
        Route("/v1/responses/{id}", get, methods=["GET"]),
        Route("/v1/responses/{id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/cancel", cancel, methods=["POST"]),
        Route("/v1/responses/{id}/input_items", input_items, methods=["GET"]),
    ]
