"""A writer whose connection has broken, before anybody else has noticed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from serving.events import EventPlane, PlaneLimits
from serving.load_report import LoadReport
from serving.protocol import BlocksStored

TRIES = 200


class BrokenClient:
    """Refuses every message at once, as the client of a closed connection does."""

    def __init__(self) -> None:
        self.num_refused = 0

    async def publish(self, subject: str, payload: bytes) -> None:
        self.num_refused += 1
        if self.num_refused > TRIES:
            raise AssertionError("it publishes for ever")
        raise ConnectionError("the connection is closed")


class WorkingClient:
    def __init__(self) -> None:
        self.subjects: list[str] = []

    async def publish(self, subject: str, payload: bytes) -> None:
        self.subjects.append(subject)


async def test_failed_publish_does_not_publish_again_before_the_connection_is_back() -> None:
    plane = EventPlane("nats://127.0.0.1:1", "ns", None, PlaneLimits())
    plane._identity = ("a", 1)
    broken: Any = BrokenClient()
    plane._connection.client = broken
    writer = asyncio.create_task(plane._write())
    try:
        plane.publish_kv([BlocksStored(None, [1])], LoadReport("a", 1))
        for _ in range(TRIES):
            await asyncio.sleep(0)
        assert broken.num_refused == 1
        working: Any = WorkingClient()
        plane._connection.client = working
        plane._connected()
        for _ in range(10):
            await asyncio.sleep(0)
        assert working.subjects == ["ns.kv.a"], "the gap is revealed once"
    finally:
        writer.cancel()
        with suppress(asyncio.CancelledError):
            await writer
