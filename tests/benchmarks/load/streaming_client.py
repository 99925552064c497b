"""Streamed completions by a client that costs little, so that the server is the limit.

HTTP/1.1 on a socket per request; events are recognised by their separators and not decoded. A
token's time is when the bytes of its event were read.
"""

from __future__ import annotations

import asyncio
import json
import re
from time import perf_counter
from typing import Any

_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_CACHED = re.compile(rb'"cached_tokens":(\d+)')


class Completion(asyncio.Protocol):
    """One request. `sent` and `times` are `perf_counter` seconds, `times` one per event with text.

    `num_tokens` and, of the prompt's, `num_cached` are what the server counted; the former is None
    until the end. `error` is empty if all was well.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = b""
        self._transport: Any = None
        self.sent = 0.0
        self.times: list[float] = []
        self.num_tokens: int | None = None
        self.num_cached = 0
        self.error = ""
        self.ended = asyncio.Event()
        self.began = asyncio.Event()

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self._transport = transport
        self.sent = perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        *events, self._buffer = (self._buffer + data).split(b"\n\n")
        for event in events:
            if b'"choices":[{' in event:
                self.times.append(now)
                self.began.set()
            elif b'"usage":{' in event and (found := _USAGE.search(event)):
                self.num_tokens = int(found[1])
                if cached := _CACHED.search(event):
                    self.num_cached = int(cached[1])
            elif b'"error"' in event:
                self._fail(event)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.num_tokens is None and not self.error:
            self._fail(self._buffer or str(exc or "it ended early").encode())
        self.began.set()
        self.ended.set()

    def cancel(self) -> None:
        """Leave; the server aborts the request."""
        self.error = self.error or "cancelled"
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, body: bytes) -> None:
        self.error = body[-300:].decode(errors="replace").strip()


class Client:
    """Requests to one server."""

    def __init__(self, port: int, model: str) -> None:
        self._port, self._model = port, model

    def encode(self, token_ids: list[int], num_tokens: int, **more: Any) -> bytes:
        """The bytes of a request for exactly `num_tokens` tokens."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": token_ids,
                "max_tokens": num_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **more,
            },
            separators=(",", ":"),
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def send(self, request: bytes) -> Completion:
        """Start it; wait for `began` or `ended`. Raises OSError when nobody listens."""
        loop = asyncio.get_running_loop()
        _, completion = await loop.create_connection(
            lambda: Completion(request), "127.0.0.1", self._port
        )
        return completion
