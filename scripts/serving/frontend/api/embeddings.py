"""`/v1/embeddings`: hidden states of the served model, pooled over each input."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import secrets
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, cast

import numpy as np
import orjson
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.errors import EngineFailed, InvalidRequest, ModelError
from serving.frontend.api.errors import ApiError, to_api_error
from serving.frontend.api.fields import RequestDecoder, check_text
from serving.frontend.api.state import AppState
from serving.frontend.http.body import read_body
from serving.frontend.http.limits import ClientGone, cancelled_on_disconnect
from serving.frontend.http.replies import error_response
from serving.frontend.model import LoadedModel
from serving.frontend.served.model import ServedModel
from serving.model_folder import EmbeddingRule, embedding_rule
from serving.protocol import SamplingParams
from serving.text.preprocess import PreparedRequest

log = logging.getLogger("serving.frontend")

MAX_INPUTS = 2048
AT_ONCE = 16
"""Inputs of one request that workers compute at the same time."""
CLIENT_CLOSED = 499
_NOTHING_GENERATED = SamplingParams(max_tokens=1, temperature=0.0)

Input = str | list[int]


class EmbeddingRequest(Struct, kw_only=True):
    """The body. `input` is one text, token ids, or a list of either."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None

    def inputs(self) -> list[Input]:
        """Raises InvalidRequest for a mixed list, an empty input, or too many."""
        if isinstance(self.input, str):
            found: list[Input] = [self.input]
        elif len(kinds := set(map(type, self.input))) > 1:
            raise InvalidRequest("`input` mixes strings and token ids", param="input")
        elif kinds == {int}:
            found = [cast("list[int]", self.input)]
        else:
            found = [item for item in self.input if not isinstance(item, int)]
        if not found or not all(found):
            raise InvalidRequest("`input` must not be empty, nor hold an empty one", param="input")
        if len(found) > MAX_INPUTS:
            raise InvalidRequest(
                f"`input` has {len(found)} items; at most {MAX_INPUTS} are possible", param="input"
            )
        return found


_decoder = RequestDecoder(EmbeddingRequest)


def embedding_routes(state: AppState) -> list[Route]:
    async def endpoint(request: Request) -> Response:
        return await EmbeddingCall(state).answer(request)

    return [Route("/v1/embeddings", endpoint, methods=["POST"])]


class EmbeddingCall:
    """One request and its response."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._request_id = f"embd-{secrets.token_hex(16)}"
        self._arrived = perf_counter()
        self._num_tokens = 0
        self._model: ServedModel | None = state.models.only

    async def answer(self, request: Request) -> Response:
        """The response, in every case; records the outcome."""
        error: ApiError | None = None
        try:
            body = await self._embed(request)
            response = Response(body, media_type="application/json")
        except ClientGone:
            response = Response(status_code=CLIENT_CLOSED)  # nobody reads it
        except Exception as exc:
            error = to_api_error(exc)
            response = error_response(error)
        response.headers["x-request-id"] = self._request_id
        self._record(response.status_code, error)
        return response

    async def _embed(self, request: Request) -> bytes:
        """Raises ServingError, ClientGone."""
        state = self._state
        body = await read_body(
            request.scope, request.receive, state.max_body_bytes, timeout_s=state.body_timeout_s
        )
        wanted = _decoder.decode(body)
        served = self._model = state.models.find(wanted.model)
        inputs = wanted.inputs()
        model = await served.load()
        rule = _rule(model)
        if rule.size and (wanted.dimensions or 0) > rule.size:
            raise InvalidRequest(
                f"`dimensions` is {wanted.dimensions}, and this model's embeddings have {rule.size}",
                param="dimensions",
            )
        prepared = [
            PreparedRequest(
                request_id=f"{self._request_id}-{index}",
                token_ids=await _encode(item, model),
                sampling=_NOTHING_GENERATED,
                session=wanted.user,
                pooling=rule.pooling,
            )
            for index, item in enumerate(inputs)
        ]
        self._num_tokens = sum(len(each.token_ids) for each in prepared)
        async with cancelled_on_disconnect(request.receive):
            vectors = await _vectors(prepared, served)
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, rule, wanted)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": self._num_tokens, "total_tokens": self._num_tokens}
        answer = {"object": "list", "data": data, "model": wanted.model, "usage": usage}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    def _record(self, status: int, error: ApiError | None) -> None:
        """Update the metrics and write the one log line of this request."""
        outcome = "stop" if status == 200 else "cancelled" if status == CLIENT_CLOSED else "error"
        metrics = (self._model or self._state.models).metrics
        metrics.requests.add(1, "embeddings", str(status), outcome)
        metrics.prompt_tokens.add(self._num_tokens)
        log.info(
            "%s model=%s prompt_tokens=%d duration_ms=%.1f status=%d%s",
            self._request_id,
            self._model.name if self._model else "",
            self._num_tokens,
            1000 * (perf_counter() - self._arrived),
            status,
            f" error={error.message!r}" if error else "",
        )


async def _vectors(prepared: list[PreparedRequest], model: ServedModel) -> list[bytes]:
    """The pooled hidden states of each input, a few inputs at a time. Raises ServingError."""
    vectors = [b""] * len(prepared)
    waiting = iter(enumerate(prepared))
    num_tasks = min(AT_ONCE, len(prepared))

    async def take(waiting: Iterator[tuple[int, PreparedRequest]]) -> None:
        for index, each in waiting:
            vectors[index] = await _vector(each, model)

    with model.in_flight.hold(num_tasks):
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(num_tasks):
                    tasks.create_task(take(waiting))
        except ExceptionGroup as group:  # one failed input fails the response
            raise group.exceptions[0] from None
    return vectors


async def _vector(prepared: PreparedRequest, model: ServedModel) -> bytes:
    async with aclosing(model.pipeline.generate(prepared)) as outputs:
        async for output in outputs:
            if output.embedding is not None:
                return output.embedding
    raise EngineFailed(f"{prepared.request_id} ended without an embedding")


def _rule(model: LoadedModel) -> EmbeddingRule:
    """Raises InvalidRequest for a model whose embeddings are not computed here."""
    try:
        return embedding_rule(Path(model.card.tokenizer_dir))
    except ModelError as exc:
        raise InvalidRequest(exc.what, param="model") from exc


async def _encode(item: Input, model: LoadedModel) -> list[int]:
    """Raises InvalidRequest for what is no text, no token, or longer than the context."""
    preprocessor = model.preprocessor
    await asyncio.sleep(0)  # Many inputs must not hold up other streams.
    if isinstance(item, str):
        check_text(item, "input")
        token_ids = await preprocessor.encode_text(item, param="input")
    else:
        preprocessor.check_token_ids(item, param="input")
        token_ids = item
    limit = model.card.max_model_len
    if len(token_ids) > limit:
        raise InvalidRequest(
            f"This model's maximum context length is {limit} tokens. An input has {len(token_ids)} "
            "tokens. Shorten it, or raise `engine.max_model_len`",
            param="input",
            code="context_length_exceeded",
        )
    return token_ids


def _written(vector: bytes, rule: EmbeddingRule, wanted: EmbeddingRequest) -> Any:
    """The embedding in the format that was asked for: float32 numbers, or their bytes."""
    values = np.frombuffer(vector, dtype="<f4")[: wanted.dimensions].astype(np.float32)
    if rule.normalize or wanted.dimensions is not None:
        length = math.sqrt(float(np.dot(values.astype(np.float64), values.astype(np.float64))))
        values = (values / (length or 1.0)).astype(np.float32)
    if wanted.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values
