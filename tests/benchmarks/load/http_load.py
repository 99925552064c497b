"""A load of chat completions whose client costs little, so that the server is the limit.

HTTP/1.1 over kept connections; requests are bytes made before the clock starts, events are counted
by their separators and not decoded. A plain client: it asks its kernel for no quick
acknowledgements, so a server that leaves small writes to Nagle's algorithm shows it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from msgspec import Struct, field

WORDS = [
    "prefill",
    "decode",
    "block",
    "token",
    "worker",
    "router",
    "event",
    "queue",
    "cache",
    "batch",
    "step",
    "index",
]
_HEAD_END, _STREAM_END, _CONTENT = b"\r\n\r\n", b"\r\n0\r\n\r\n", b'"content":"'
_numbers = itertools.count()


class Shape(Struct, frozen=True):
    """One request: `num_tokens` new tokens after a fresh prompt of `num_words` words.

    The same `num_tools` tools of about `tool_bytes` bytes come with every request.
    """

    num_tokens: int
    num_words: int = 40
    stream: bool = True
    num_tools: int = 0
    tool_bytes: int = 0


class Result(Struct):
    """Times in seconds from sending a request: to its first event (or byte), and to its end."""

    num_requests: int = 0
    num_events: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


def encode(model: str, shape: Shape) -> bytes:
    """The bytes of one request with a prompt of its own."""
    number = next(_numbers)
    words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(shape.num_words)]
    fields: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{number} {' '.join(words)}"}],
        "max_tokens": shape.num_tokens,
        "ignore_eos": True,
        "stream": shape.stream,
    }
    if shape.num_tools:
        fields["tools"] = [tool(place, shape.tool_bytes) for place in range(shape.num_tools)]
    body = json.dumps(fields, separators=(",", ":")).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def tool(number: int, num_bytes: int) -> dict[str, Any]:
    """A function with as many parameters as fill `num_bytes` of JSON."""
    properties: dict[str, Any] = {}
    function = {
        "name": f"tool_{number}",
        "description": "Looks up one kind of thing.",
        "parameters": {"type": "object", "properties": properties},
    }
    described = {"type": "function", "function": function}
    while len(json.dumps(described)) < num_bytes - 60:
        properties[f"field_{len(properties)}"] = {
            "type": "string",
            "description": f"the {WORDS[len(properties) % len(WORDS)]} to look for",
        }
    return described


class _Connection(asyncio.Protocol):
    """Sends one request after the other, each when the one before was answered in full."""

    def __init__(self, requests: Iterator[bytes], result: Result) -> None:
        self._requests, self._result = requests, result
        self._transport: Any = None
        self._buffer = bytearray()
        self._wanted, self._is_chunked = 0, False
        self._sent = 0.0
        self._is_first = True
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        buffer = self._buffer
        buffer += data
        if self._is_first:
            head, separator, rest = buffer.partition(_HEAD_END)
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._end(RuntimeError(buffer[-500:].decode(errors="replace")))
                return
            if not rest:
                return
            self._result.first_s.append(now - self._sent)
            self._is_first = False
            self._is_chunked = b"transfer-encoding: chunked" in head.lower()
            if not self._is_chunked:
                self._wanted = len(head) + len(_HEAD_END) + _content_length(head)
        if self._is_chunked:
            if buffer.endswith(_STREAM_END):
                self._result.num_events += buffer.count(_CONTENT)
                self._answered(now)
        elif len(buffer) >= self._wanted:
            self._answered(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or RuntimeError("the server closed a connection"))

    def _answered(self, now: float) -> None:
        self._result.whole_s.append(now - self._sent)
        self._result.num_requests += 1
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._end(None)
            return
        self._buffer, self._is_first = bytearray(), True
        self._sent = perf_counter()
        self._transport.write(request)

    def _end(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
            self._transport.close()


def _content_length(head: bytearray) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise RuntimeError("a response without a content-length")


async def load(
    port: int, model: str, shape: Shape, *, connections: int, num_requests: int
) -> Result:
    """Run it. Raises RuntimeError at the first response that is not a 200."""
    requests = iter([encode(model, shape) for _ in range(num_requests)])
    result = Result()
    loop = asyncio.get_running_loop()
    started = perf_counter()
    made = await asyncio.gather(
        *(
            loop.create_connection(lambda: _Connection(requests, result), "127.0.0.1", port)
            for _ in range(connections)
        )
    )
    async with asyncio.timeout(120):
        await asyncio.gather(*(protocol.done for _, protocol in made))
    result.wall_s = perf_counter() - started
    return result


async def load_alone(port: int, model: str, shape: Shape, *, num_requests: int) -> Result:
    """One request after the other, each on a connection of its own, made before the clock starts."""
    result, loop = Result(), asyncio.get_running_loop()
    started = perf_counter()
    for _ in range(num_requests):
        requests = iter([encode(model, shape)])
        _, protocol = await loop.create_connection(
            lambda requests=requests: _Connection(requests, result),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        async with asyncio.timeout(30):
            await protocol.done
    result.wall_s = perf_counter() - started
    return result
