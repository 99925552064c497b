"""Requests as browsers, old proxies and strangers send them."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from serving.frontend.api.state import AppState
from serving.frontend.app import create_app
from serving.frontend.http.browsers import with_browser_rules
from serving.frontend.http.protocol import LimitedHttpProtocol
from unit.frontend.fakes import MODEL, FakePipeline
from waiting import until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
BODY = json.dumps(CHAT).encode()
PATH = "/v1/chat/completions"


@pytest.fixture
async def guarded(state: AppState) -> AsyncIterator[httpx.AsyncClient]:
    app = with_browser_rules(
        create_app(state), origins=["https://app.example"], allowed_hosts=["model.lan"]
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_body_is_read(client: httpx.AsyncClient, encoding: str) -> None:
    data = gzip.compress(BODY) if encoding == "gzip" else zlib.compress(BODY)
    headers = {"content-encoding": encoding}
    assert (await client.post(PATH, content=data, headers=headers)).status_code == 200


async def test_limit_applies_to_what_a_body_becomes(client: httpx.AsyncClient) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    assert len(bomb) < 64 * 1024
    response = await client.post(PATH, content=bomb, headers={"content-encoding": "gzip"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("headers", "content", "code"),
    [
        ({"content-encoding": "br"}, BODY, "unsupported_content_encoding"),
        ({"content-encoding": "gzip"}, BODY, "invalid_content_encoding"),
        ({"content-encoding": "gzip"}, gzip.compress(BODY)[:-9], "invalid_content_encoding"),
        ({"content-type": "text/plain"}, BODY, "unsupported_media_type"),
        ({"content-type": "multipart/form-data; boundary=x"}, BODY, "unsupported_media_type"),
    ],
)
async def test_body_that_cannot_be_read_is_415(
    client: httpx.AsyncClient, headers: dict[str, str], content: bytes, code: str
) -> None:
    response = await client.post(PATH, content=content, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "model.lan"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://app.example"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_foreign_pages_are_refused(
    guarded: httpx.AsyncClient, pipeline: FakePipeline, headers: dict[str, str], status: int
) -> None:
    response = await guarded.post(PATH, json=CHAT, headers=headers)
    assert response.status_code == status, response.text
    assert bool(pipeline.seen) == (status == 200)
    allowed = response.headers.get("access-control-allow-origin")
    assert (allowed == headers.get("origin")) if status == 200 else allowed is None


async def test_preflight_of_a_page_on_loopback_is_allowed(guarded: httpx.AsyncClient) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    response = await guarded.options(PATH, headers={"origin": "http://127.0.0.1:5173", **ask})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://127.0.0.1:5173"
    response = await guarded.options(PATH, headers={"origin": "https://evil.example", **ask})
    assert "access-control-allow-origin" not in response.headers


async def test_request_id_of_the_client_is_echoed(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json=CHAT, headers={"x-request-id": "trace-7"})
    assert response.headers["x-request-id"] == "trace-7"
    response = await client.post(PATH, json=CHAT, headers={"x-request-id": "two words"})
    assert response.headers["x-request-id"] == response.json()["id"]


class QuickProtocol(LimitedHttpProtocol):
    head_timeout_s = 0.2


@pytest.fixture
async def port(state: AppState) -> AsyncIterator[int]:
    """Of a real server with the limits of `QuickProtocol`."""
    config = uvicorn.Config(
        create_app(state), port=0, http=QuickProtocol, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def exchange(port: int, data: bytes) -> bytes:
    """Everything that the server says until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_head_that_never_ends_is_cut_at_its_limit(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
    sent = 0
    try:
        while sent < 10_000_000:
            writer.write(b"x-many: " + b"a" * 1000 + b"\r\n")
            sent += 1010
            await writer.drain()
    except OSError:
        pass
    assert sent < 10_000_000, "the server closed the connection"
    writer.close()


async def test_slow_head_and_silent_connection_are_closed(port: int) -> None:
    assert (await exchange(port, b"GET /health HTTP/1.1\r\nhost: ")).startswith(b"HTTP/1.1 408")
    assert await exchange(port, b"") == b""


async def test_http_1_0_stream_is_a_plain_body_that_ends_with_the_connection(port: int) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.0\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    response = await exchange(port, head.encode() + body)
    head_bytes, _, events = response.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head_bytes.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


async def test_stream_on_a_kept_connection_is_followed_by_another_request(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(3):
            response = await client.post(PATH, json={**CHAT, "stream": True})
            assert response.text.endswith("data: [DONE]\n\n")


def choice(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]
    return found


async def test_line_separators_are_escaped_in_events(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("a\u2028b\u2029c\x85d")
    response = await client.post(PATH, json={**CHAT, "stream": True})
    for raw in ("\u2028", "\u2029", "\x85"):
        assert raw.encode() not in response.content
    events = [line for line in response.text.split("\n") if line.startswith("data: {")]
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "a\u2028b\u2029c\x85d"
