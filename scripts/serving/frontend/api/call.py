"""One request for a completion and its response, from the first byte to the log line.

Plain ASGI, because a wrapped response costs as much again per chunk as the chunk itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from time import perf_counter
from typing import Generic, TypeVar

from msgspec import Struct
from starlette.types import Receive, Scope, Send

from serving.errors import NoInstances, Overloaded
from serving.frontend.api import chat, completions
from serving.frontend.api.errors import ApiError, to_api_error
from serving.frontend.api.fields import GenerationFields
from serving.frontend.api.generation import Generation
from serving.frontend.api.limits import ClientGone, InFlight, cancelled_on_disconnect, read_body
from serving.frontend.api.models import check_model
from serving.frontend.api.response import CompletionPlan
from serving.frontend.api.sse import end_stream, send_deltas
from serving.frontend.metrics.registry import Metrics
from serving.frontend.model import LoadedModel, ModelLoader
from serving.frontend.pipeline import Pipeline

log = logging.getLogger("serving.frontend")

CLIENT_CLOSED = 499
"""Logged and counted, never sent: the client left before the end."""

_random = Random()  # ids are unique and no secrets: no system call for each

Body = TypeVar("Body", bound=GenerationFields)
Headers = tuple[tuple[bytes, bytes], ...]


class AppState(Struct, frozen=True):
    """What the routes share."""

    pipeline: Pipeline
    metrics: Metrics
    in_flight: InFlight
    models: ModelLoader
    model_name: str
    max_body_bytes: int


class CompletionApi(Struct, Generic[Body], frozen=True):
    """One way to ask for a completion: how to read the request and plan its response."""

    name: str
    id_prefix: str
    parse: Callable[[bytes], Body]
    prepare: Callable[[Body, LoadedModel, str], Awaitable[CompletionPlan]]


CHAT = CompletionApi(chat.NAME, chat.ID_PREFIX, chat.parse, chat.prepare)
COMPLETIONS = CompletionApi(
    completions.NAME, completions.ID_PREFIX, completions.parse, completions.prepare
)


class CompletionRoute(Generic[Body]):
    """ASGI application of one endpoint."""

    def __init__(self, endpoint: CompletionApi[Body], parts: AppState) -> None:
        self._endpoint, self._parts = endpoint, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"{self._endpoint.id_prefix}{_random.getrandbits(128):032x}"
        exchange = CompletionCall(self._endpoint, self._parts, request_id, send)
        await exchange.serve(scope, receive)


class CompletionCall(Generic[Body]):
    """One request and its response."""

    def __init__(
        self, endpoint: CompletionApi[Body], parts: AppState, request_id: str, send: Send
    ) -> None:
        self._endpoint, self._parts, self._send = endpoint, parts, send
        self._request_id, self._arrived = request_id, perf_counter()
        self._headers = ((b"x-request-id", request_id.encode()),)
        self._generation: Generation | None = None

    async def serve(self, scope: Scope, receive: Receive) -> None:
        """Answer, whatever happens, and account for it."""
        status, error = CLIENT_CLOSED, None
        in_flight = self._parts.in_flight
        try:
            with in_flight.hold(1):
                generation = self._generation = await self._understand(scope, receive)
                num_sequences = len(generation.sequences)
                in_flight.check_possible(num_sequences)
                with in_flight.hold(num_sequences - 1):
                    if generation.plan.stream:
                        error = await self._stream(generation, receive)
                    else:
                        await self._whole(generation, receive)
            status = 200
        except ClientGone:
            pass
        except Exception as exc:
            if isinstance(exc, Overloaded) and not isinstance(exc, NoInstances):
                exc.retry_after_s = max(exc.retry_after_s, in_flight.place_s())
            error = to_api_error(exc)
            status = error.status
            await send_error(self._send, error, self._headers)
        finally:
            self._account(status, error)

    async def _understand(self, scope: Scope, receive: Receive) -> Generation:
        """Read, check and tokenize. Of the body, only tokens live on while they are continued.

        Raises ServingError, ClientGone.
        """
        parts = self._parts
        body = await read_body(scope, receive, parts.max_body_bytes)
        request = self._endpoint.parse(body)
        check_model(request.model, parts.model_name)
        model = await parts.models.load(parts.pipeline.card)
        plan = await self._endpoint.prepare(request, model, self._request_id)
        tokenizer = model.preprocessor.tokenizer
        return Generation(plan, parts.pipeline, tokenizer, parts.metrics, self._arrived)

    async def _whole(self, generation: Generation, receive: Receive) -> None:
        """Raises ServingError, ClientGone."""
        async with cancelled_on_disconnect(receive):
            deltas = await generation.whole()
        body = generation.plan.writer.whole(deltas, generation.usage())
        await send_json(self._send, 200, body, self._headers)

    async def _stream(self, generation: Generation, receive: Receive) -> ApiError | None:
        """Returns the error of a stream that had begun. Raises ServingError, ClientGone."""
        async with cancelled_on_disconnect(receive):
            producer = asyncio.create_task(generation.run(), name=self._request_id)
            try:
                error = await send_deltas(generation, self._send, self._headers)
            finally:
                producer.cancel()
                await asyncio.wait([producer])  # until what it held is released
        # Not inside: once a response is complete, servers report a disconnect.
        await end_stream(generation, error, self._send)
        return error

    def _account(self, status: int, error: ApiError | None) -> None:
        """Metrics and the one log line of this request."""
        duration_s = perf_counter() - self._arrived
        generation = self._generation
        if status == CLIENT_CLOSED:
            finish_reason = "cancelled"
        elif error is not None:
            finish_reason = "error"
        else:
            assert generation is not None
            finish_reason = generation.sequences[0].finish_reason or "error"
        metrics = self._parts.metrics
        metrics.requests.add(1, self._endpoint.name, str(status), finish_reason)
        if status == 200:
            metrics.e2e_request_latency.observe(duration_s)
        if not log.isEnabledFor(logging.INFO):
            return
        usage = generation.usage() if generation else None
        ttft_s = generation.ttft_s() if generation else None
        log.info(
            "%s model=%s instances=%s overlap_blocks=%d prompt_tokens=%d cached_tokens=%d "
            "completion_tokens=%d ttft_ms=%s duration_ms=%.1f finish_reason=%s status=%d%s",
            self._request_id,
            self._parts.model_name,
            ",".join(generation.instances()) if generation else "",
            generation.overlap_blocks() if generation else 0,
            usage.prompt_tokens if usage else 0,
            usage.cached_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            "-" if ttft_s is None else f"{1000 * ttft_s:.1f}",
            1000 * duration_s,
            finish_reason,
            status,
            f" error={error.message!r}" if error else "",
        )


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """A whole JSON response."""
    own = ((b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Headers = ()) -> None:
    """An error, before anything else was sent."""
    await send_json(send, error.status, error.body(), (*headers, *error.headers()))
