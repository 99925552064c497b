"""Idle strangers never keep the newcomer out, and above all not the one who asks for `/health`."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvicorn
from serving.frontend.http.protocol import LimitedHttpProtocol, connection_limit
from waiting import until

LIMIT = 8
released = asyncio.Event()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """`/slow` answers when it is released, everything else at once."""
    if scope["path"] == "/slow":
        await released.wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"well"})


class FewConnections(LimitedHttpProtocol):
    max_connections = LIMIT


@pytest.fixture
async def port() -> AsyncIterator[int]:
    released.clear()
    config = uvicorn.Config(
        app, port=0, http=FewConnections, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server._serve())
        await until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
        released.set()
        server.should_exit = server.force_exit = True


async def connect(port: int, stack: AsyncExitStack) -> tuple[asyncio.StreamReader, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.callback(writer.close)
    return reader, writer


async def ask(port: int, path: str, stack: AsyncExitStack) -> asyncio.StreamReader:
    reader, writer = await connect(port, stack)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return reader


async def test_newcomer_is_served_in_place_of_a_silent_connection(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    FewConnections._logged.clear()
    async with asyncio.timeout(10), AsyncExitStack() as stack:
        silent = [await connect(port, stack) for _ in range(3 * LIMIT)]
        with caplog.at_level(logging.WARNING):
            answer = await ask(port, "/health", stack)
            assert (await answer.readline()).startswith(b"HTTP/1.1 200")
        await until(lambda: sum(reader.at_eof() for reader, _ in silent) >= 2 * LIMIT)
        assert len(caplog.records) <= 1  # not one for each


async def test_busy_connections_are_kept_and_the_next_one_gets_503(port: int) -> None:
    async with asyncio.timeout(10), AsyncExitStack() as stack:
        busy = [await ask(port, "/slow", stack) for _ in range(LIMIT)]
        await asyncio.sleep(0)
        refused = await ask(port, "/health", stack)
        assert (await refused.readline()).startswith(b"HTTP/1.1 503")
        released.set()
        for reader in busy:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("files", "limit"), [(256, 128), (1024, 768), (8192, 7936), (resource.RLIM_INFINITY, 1048320)]
)
def test_limit_leaves_descriptors_to_everything_else(
    files: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connection_limit() == limit
