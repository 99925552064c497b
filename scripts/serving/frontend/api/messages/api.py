"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import ServingError
from serving.frontend.api.answer import BasicSampling, prepare_answer
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.messages.errors import error_body
from serving.frontend.api.messages.request import (
    MessagesRequest,
    conversation,
    parse,
    parse_count,
)
from serving.frontend.api.messages.writer import MessagesWriter
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.state import AppState
from serving.frontend.http.body import read_body
from serving.frontend.http.replies import json_response
from serving.frontend.model import LoadedModel


async def prepare(request: MessagesRequest, model: LoadedModel, request_id: str) -> CompletionPlan:
    """Raises InvalidRequest."""
    asked, ignored = conversation(request)
    user = (request.metadata or {}).get("user_id")
    samples = await prepare_answer(
        BasicSampling(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=request.stop_sequences,
        ),
        asked,
        model,
        request_id,
        max_tokens=request.max_tokens,
        # Clients ask for as much as the largest model writes, whatever is served.
        cut_to_context=True,
        session=user if isinstance(user, str) else None,
    )
    writer = MessagesWriter(request_id, request.model, len(samples[0].token_ids))
    return CompletionPlan(
        samples=samples, writer=writer, stream=bool(request.stream), ignored=tuple(ignored)
    )


API = CompletionApi("messages", "msg_", parse, prepare, error_body)


def messages_routes(state: AppState) -> list[Route]:
    async def count_tokens(request: Request) -> Response:
        try:
            body = await read_body(
                request.scope, request.receive, state.max_body_bytes, timeout_s=state.body_timeout_s
            )
            message = parse_count(body)
            model = await state.models.find(message.model).load()
            asked, _ = conversation(message)
            prompt = await model.preprocessor.encode_conversation(asked)
        except ServingError as exc:
            error = to_api_error(exc)
            return Response(error_body(error), error.status, media_type="application/json")
        return json_response({"input_tokens": len(prompt.token_ids)})

    return [Route("/v1/messages/count_tokens", count_tokens, methods=["POST"])]
