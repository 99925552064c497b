"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: evaluation harnesses and
clients that count tokens call them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import InvalidRequest, ServingError
from serving.frontend.api.chat.request import ChatMessage, ChatRequest
from serving.frontend.api.errors import to_api_error
from serving.frontend.api.fields import RequestDecoder
from serving.frontend.api.state import AppState
from serving.frontend.http.body import read_body
from serving.frontend.http.replies import error_response, json_response
from serving.frontend.model import LoadedModel
from serving.model_folder import json_object


class TokenizeRequest(ChatRequest, kw_only=True):
    """Text (`prompt`), or messages as a chat request has them."""

    model: str | None = None  # type: ignore[assignment]
    messages: list[ChatMessage] = field(default_factory=list)
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct):
    tokens: list[int]
    model: str | None = None


_tokenize = RequestDecoder(TokenizeRequest)
_detokenize = RequestDecoder(DetokenizeRequest)

Answer = Callable[[bytes], Awaitable[dict[str, Any]]]


def token_routes(state: AppState) -> list[Route]:
    def route(path: str, answer: Answer) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                body = await read_body(
                    request.scope,
                    request.receive,
                    state.max_body_bytes,
                    timeout_s=state.body_timeout_s,
                )
                return json_response(await answer(body))
            except ServingError as exc:
                return error_response(to_api_error(exc))

        return Route(path, endpoint, methods=["POST"])

    async def tokenize(body: bytes) -> dict[str, Any]:
        request = _tokenize.decode(body)
        return await _tokenized(request, await state.models.find_or_only(request.model).load())

    async def detokenize(body: bytes) -> dict[str, Any]:
        request = _detokenize.decode(body)
        model = await state.models.find_or_only(request.model).load()
        model.preprocessor.check_token_ids(request.tokens, param="tokens")
        return {"prompt": model.preprocessor.decode(request.tokens)}

    async def tokenizer_info(request: Request) -> Response:
        try:
            requested = request.query_params.get("model")
            model = await state.models.find_or_only(requested).load()
        except ServingError as exc:
            return error_response(to_api_error(exc))
        config = json_object(Path(model.card.tokenizer_dir) / "tokenizer_config.json")
        template = model.preprocessor.chat_template
        if template is not None:
            config["chat_template"] = template.source
        return json_response(config)

    return [
        route("/tokenize", tokenize),
        route("/detokenize", detokenize),
        Route("/tokenizer_info", tokenizer_info),
    ]


async def _tokenized(request: TokenizeRequest, model: LoadedModel) -> dict[str, Any]:
    preprocessor = model.preprocessor
    if request.messages:
        prompt = await preprocessor.encode_conversation(request.conversation())
        token_ids = prompt.token_ids
    elif request.prompt is not None:
        token_ids = await preprocessor.encode_text(
            request.prompt, add_special_tokens=request.add_special_tokens is not False
        )
    else:
        raise InvalidRequest("`prompt` or `messages` is required", param="prompt")
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": model.card.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if request.return_token_strs:
        answer["token_strs"] = [model.token_text(token_id)[0] for token_id in token_ids]
    return answer
