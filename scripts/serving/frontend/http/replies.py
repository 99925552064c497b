"""Whole JSON responses and errors, for Starlette's routes and for plain ASGI."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Send

from serving.frontend.api.errors import ApiError

Headers = tuple[tuple[bytes, bytes], ...]


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, media_type="application/json")


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    own = ((b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send, error: ApiError, headers: Headers = (), body: bytes | None = None
) -> None:
    """An error, before anything else was sent. `body`: instead of OpenAI's."""
    own = error.body() if body is None else body
    await send_json(send, error.status, own, (*headers, *error.headers()))
