"""How a prompt's KV gets from a prefill worker to a decode worker: by us, or by the engine.

A worker has one handover. `BlockHandover` (block_handover.py) moves the blocks of a `BlockEngine` over a KV
transport; `EngineHandover` passes the requests to an engine that moves KV by itself.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

from serving.config.process import WorkerSettings
from serving.engine.base import BlockEngine, TransferringEngine
from serving.load_report import KvTransferTotals
from serving.protocol import EngineOutput, EngineRequest


class Handover(ABC):
    """Stands between the worker and its engine for requests of the phases prefill and decode.

    `address` is where decode workers fetch KV; empty: the engine has its own. `num_held` counts
    requests whose KV waits to be fetched.
    """

    address = ""
    transfers: KvTransferTotals
    num_held = 0

    async def serve(self) -> None:  # noqa: B027, an engine listens by itself
        """Let decode workers fetch. Raises OperatorError when the transport is not available."""

    @abstractmethod
    def submit(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""

    def on_output(self, output: EngineOutput) -> EngineOutput | None:
        """Sees every output of the engine. Returns what the frontend gets; None: nothing."""
        return output

    def abort(self, request_id: str) -> None:  # noqa: B027, an engine aborts by itself
        """Forget the request. The worker aborts it in the engine."""

    def release(self, request_id: str) -> None:  # noqa: B027
        """No decode worker will fetch the KV of a finished prefill: free it."""

    async def close(self) -> None:  # noqa: B027
        """Stop listening, and cancel running fetches."""


def make_handover(
    settings: WorkerSettings,
    epoch: int,
    engine: BlockEngine | TransferringEngine,
    tasks: asyncio.TaskGroup,
    send: Callable[[EngineOutput], None],
) -> Handover:
    """The handover that fits the engine, which has started. `send` delivers outputs that no
    engine step produced; `tasks` own the fetches."""
    if isinstance(engine, BlockEngine):
        # Imported here: images for TensorRT-LLM have no packages for transports of our own.
        from serving.worker.block_handover import BlockHandover

        return BlockHandover(settings, epoch, engine, tasks, send)
    return EngineHandover(engine)


class EngineHandover(Handover):
    """Passes requests to an engine that moves KV by itself; see `TransferringEngine`."""

    def __init__(self, engine: TransferringEngine) -> None:
        self._engine = engine
        self.transfers = engine.transfers

    def submit(self, request: EngineRequest) -> None:
        self._engine.submit(request)

    def release(self, request_id: str) -> None:
        self._engine.release(request_id)
