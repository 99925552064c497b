"""The UCX endpoints of one worker, and messages that outlived their pull."""

from __future__ import annotations

import asyncio
from typing import Any

from serving.kv_transfer.cancellation import stop
from serving.kv_transfer.transports.ucx.context import UcxContext, UcxMessage


class UcxEndpoints:
    """Holds the context until `close`."""

    def __init__(self, context: UcxContext) -> None:
        self.context = context
        self._endpoints: dict[bytes, Any] = {}
        self._opening = asyncio.Lock()
        self._strays: set[UcxMessage] = set()

    async def get(self, worker: bytes) -> Any:
        """The endpoint to the peer's worker; a new one if there is none that works.

        Raises ConnectionError.
        """
        async with self._opening:
            for endpoint in [e for e in self._endpoints.values() if e.closed]:
                await self.close_one(endpoint)
            if worker not in self._endpoints:
                self._endpoints[worker] = await self.context.open_endpoint(worker)
            return self._endpoints[worker]

    async def close_one(self, endpoint: Any) -> None:
        """Close an endpoint, with the messages of all pulls on it."""
        self._endpoints = {k: e for k, e in self._endpoints.items() if e is not endpoint}
        await self.context.close_endpoint(endpoint)

    def adopt(self, messages: set[UcxMessage]) -> None:
        """Keep messages that do not end, until they do or UCX itself ends."""
        self._strays.update(messages)
        for message in messages:
            message.add_done_callback(self._strays.discard)

    async def close(self) -> None:
        for endpoint in list(self._endpoints.values()):
            await self.close_one(endpoint)
        await self.context.release()
        # Only now does UCX no longer write to the memory of these messages.
        await stop(self._strays)
