"""One HTTP request for completions, from its first byte to its log line.

Plain ASGI: a response object would cost as much again per chunk as the chunk itself.
"""

from __future__ import annotations

import asyncio
import logging
import re
from random import Random
from time import perf_counter
from typing import Any

from starlette.types import Receive, Scope, Send

from serving.errors import NoInstances, Overloaded
from serving.frontend.api.errors import ApiError, to_api_error
from serving.frontend.api.plan import CompletionApi
from serving.frontend.api.state import AppState
from serving.frontend.http.body import read_body
from serving.frontend.http.generation import Generation
from serving.frontend.http.limits import ClientGone, cancelled_on_disconnect
from serving.frontend.http.replies import Headers, send_error, send_json
from serving.frontend.http.sse import end_stream, send_deltas
from serving.frontend.served.model import ServedModel

log = logging.getLogger("serving.frontend")

CLIENT_CLOSED = 499
"""Logged and counted but never sent: the client left before the end."""

_TRACE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_random = Random()  # Ids must be unique but are no secrets, so each may do without a system call.


class CompletionRoute:
    """The ASGI application of one API."""

    def __init__(self, api: CompletionApi[Any], state: AppState) -> None:
        self._api, self._state = api, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await CompletionCall(self._api, self._state, send).serve(scope, receive)


class CompletionCall:
    """One request and its response."""

    def __init__(self, api: CompletionApi[Any], state: AppState, send: Send) -> None:
        self._api, self._state, self._send = api, state, send
        self._request_id = f"{api.id_prefix}{_random.getrandbits(128):032x}"
        self._arrived = perf_counter()
        self._headers: Headers = ()
        self._model: ServedModel | None = state.models.only
        self._generation: Generation | None = None

    async def serve(self, scope: Scope, receive: Receive) -> None:
        """Answer in every case, and record the outcome."""
        status, error = CLIENT_CLOSED, None
        self._trace_id = _trace_id(scope) or self._request_id
        self._headers = ((b"x-request-id", self._trace_id.encode()),)
        try:
            self._state.models.check_room()
            body = await read_body(
                scope,
                receive,
                self._state.max_body_bytes,
                timeout_s=self._state.body_timeout_s,
                arriving=self._state.arriving,
            )
            request = self._api.parse(body)
            model = self._model = self._state.models.find(request.model)
            in_flight = model.in_flight
            with in_flight.hold(1):
                generation = self._generation = await self._prepare(request, model)
                del body, request  # only their tokens live on
                num_samples = len(generation.samples)
                in_flight.check_possible(num_samples)
                with in_flight.hold(num_samples - 1):
                    if generation.plan.stream:
                        error = await self._stream(generation, receive)
                    else:
                        await self._whole(generation, receive)
            status = 200
        except ClientGone:
            pass
        except Exception as exc:
            if isinstance(exc, Overloaded) and not isinstance(exc, NoInstances) and self._model:
                exc.retry_after_s = max(exc.retry_after_s, self._model.in_flight.retry_after_s())
            error = to_api_error(exc)
            status = error.status
            await send_error(self._send, error, self._headers, self._api.error_body(error))
        finally:
            self._record(status, error)

    async def _prepare(self, request: Any, model: ServedModel) -> Generation:
        """Check and tokenize the request. Raises ServingError."""
        loaded = await model.load()
        plan = await self._api.prepare(request, loaded, self._request_id)
        if plan.ignored:
            names = ", ".join(dict.fromkeys(plan.ignored)).encode("ascii", "replace")
            self._headers += ((b"x-ignored", names[:500]),)
        return Generation(plan, model.pipeline, loaded.token_text, model.metrics, self._arrived)

    async def _whole(self, generation: Generation, receive: Receive) -> None:
        """Raises ServingError, ClientGone."""
        async with cancelled_on_disconnect(receive):
            deltas = await generation.whole()
        body = generation.plan.writer.whole(deltas, generation.usage())
        await send_json(self._send, 200, body, self._headers)

    async def _stream(self, generation: Generation, receive: Receive) -> ApiError | None:
        """Returns the error that ended a stream halfway. Raises ServingError, ClientGone."""
        async with cancelled_on_disconnect(receive):
            producer = asyncio.create_task(generation.run(), name=self._request_id)
            try:
                error = await send_deltas(
                    generation, self._send, self._headers, self._state.stall_s
                )
            finally:
                producer.cancel()
                await asyncio.wait([producer])  # until all that it held is released
        # Outside: servers report a disconnect once a response is complete.
        await end_stream(generation, error, self._send, self._state.stall_s)
        return error

    def _record(self, status: int, error: ApiError | None) -> None:
        """Update the metrics and write the one log line of this request."""
        duration_s = perf_counter() - self._arrived
        generation = self._generation
        if status == CLIENT_CLOSED:
            finish_reason = "cancelled"
        elif error is not None:
            finish_reason = "error"
        else:
            assert generation is not None
            finish_reason = generation.samples[0].finish_reason or "error"
        metrics = (self._model or self._state.models).metrics
        metrics.requests.add(1, self._api.name, str(status), finish_reason)
        if status == 200:
            metrics.e2e_request_latency.observe(duration_s)
        if not log.isEnabledFor(logging.INFO):
            return
        usage = generation.usage() if generation else None
        ttft_s = generation.ttft_s() if generation else None
        log.info(
            "%s%s model=%s instances=%s overlap_blocks=%d prompt_tokens=%d cached_tokens=%d "
            "completion_tokens=%d ttft_ms=%s duration_ms=%.1f finish_reason=%s status=%d%s",
            self._request_id,
            f" x_request_id={self._trace_id}" if self._trace_id != self._request_id else "",
            self._model.name if self._model else "",
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


def _trace_id(scope: Scope) -> str:
    """The client's own id of the request, from `x-request-id`, if it is fit for a header and a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode("ascii") if _TRACE_ID.fullmatch(value) else ""
    return ""
