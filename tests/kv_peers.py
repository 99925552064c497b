"""Peers for the tests of KV transfer: a whole pull, a relay that cuts connections, raw bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from kv_ends import (
    LAYOUT,
    Got,
    params,
)
from serving.kv_transfer import KvTransfer

BLOCK = LAYOUT.block_bytes


async def pull_all(end: KvTransfer, address: str, request_id: str, blocks: Any) -> Got:
    got = Got(blocks)
    num_bytes = await end.pull(params(address, request_id, len(blocks)), 0, len(blocks), got)
    assert num_bytes == blocks.nbytes
    assert np.array_equal(got.blocks, blocks)
    return got


@asynccontextmanager
async def relay(address: str) -> AsyncIterator[tuple[str, Any]]:
    """A TCP relay before `address`: (its address, a function that cuts all connections)."""
    parts = urlsplit(address)
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(parts.hostname, parts.port)
        writers.extend([writer, back])
        await asyncio.gather(copy(reader, back), copy(onward, writer))

    async def cut() -> None:
        while writers:
            writers.pop().transport.abort()
        await asyncio.sleep(0.05)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"{parts.scheme}://127.0.0.1:{port}", cut
    finally:
        server.close()
        await cut()


def talk(address: str, *payloads: bytes) -> None:
    """Send raw bytes to a listener and wait until it closes or answers."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as sock:
        for payload in payloads:
            sock.sendall(payload)
        sock.settimeout(0.3)
        try:
            while sock.recv(4096):
                pass
        except (TimeoutError, ConnectionError):
            pass
