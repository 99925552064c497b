"""UCX in this process. The only module that knows `ucxx`."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from typing import Any

import msgspec

from serving.errors import OperatorError
from serving.kv_transfer.cancellation import finish, stop
from serving.kv_transfer.staging_pool import Buffer
from serving.kv_transfer.transports.ucx.guarded_ports import GuardedPorts
from serving.kv_transfer.transports.ucx.options import (
    MAX_HOSTS,
    UcxAddress,
    own_hosts,
    ucx_environment,
    ucx_options,
)

log = logging.getLogger(__name__)

CLOSE_NS = 10**9

UcxMessage = asyncio.Task[Any]
"""A send or receive that was posted to UCX."""


class UcxContext:
    """`ucxx` has one context for the whole process, bound to one event loop; all transports of the
    process share it."""

    current: UcxContext | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changing = asyncio.Lock()
        self._num_users = 0
        self._to_itself: Any = None
        self._fillers: set[UcxMessage] = set()
        self.port = GuardedPorts()
        self.address = b""  # a UcxAddress, for ChannelHello
        self._ucxx: Any = None

    @classmethod
    async def acquire(cls, host: str, on_gpu: bool) -> UcxContext:
        """The running context. The first user decides the options. Pair with `release`.

        Raises OperatorError when UCX does not work here.
        """
        loop = asyncio.get_running_loop()
        if cls.current is None or cls.current._loop is not loop:
            if cls.current and cls.current._num_users:
                raise RuntimeError("another event loop of this process is using UCX")
            cls.current = cls(loop)
        context = cls.current
        async with context._changing:
            if context._num_users == 0:
                await context._start(host, on_gpu)
            context._num_users += 1
        return context

    async def release(self) -> None:
        async with self._changing:
            self._num_users -= 1
            if self._num_users == 0:
                await stop(self._fillers)
                await self.close_endpoint(self._to_itself)
                self._to_itself = None
                # ucxx hooks the loop's `close`, and that hook would keep its worker, with thread
                # and descriptors, for as long as the loop lives.
                vars(self._loop).pop("close", None)
                # Takes up to a second, the period of the thread that it joins.
                await finish(asyncio.to_thread(self._ucxx.reset))

    async def open_endpoint(self, worker: bytes) -> Any:
        """A new endpoint to the worker at this UCX address. Raises ConnectionError."""
        try:
            address = self._ucxx.get_ucx_address_from_buffer(bytearray(worker))
            return await self._ucxx.create_endpoint_from_worker_address(address)
        except self._ucxx.exceptions.UCXError as exc:
            raise ConnectionError(f"no UCX endpoint: {exc}") from exc

    async def close_endpoint(self, endpoint: Any) -> None:
        """Cancels the endpoint's messages."""
        await endpoint.close(period=CLOSE_NS)

    def post_send(self, endpoint: Any, tag: int, data: Buffer) -> UcxMessage:
        return asyncio.create_task(endpoint.send(data, tag=tag, force_tag=True))

    def post_receive(self, tag: int, data: Buffer) -> UcxMessage:
        return asyncio.create_task(self._ucxx.recv(data, tag=tag), name="kv-ucx")

    async def outcome(self, message: UcxMessage) -> None:
        """Wait for a message. Raises ConnectionResetError. A cancelled caller does not cancel it."""
        try:
            await asyncio.shield(message)
        except self._ucxx.exceptions.UCXError as exc:
            raise ConnectionResetError(f"UCX: {exc}") from exc

    def satisfy(self, tag: int) -> None:
        """End a receive whose chunk will not come. If the chunk comes after all, one byte stays in
        UCX's queue of unexpected messages."""
        filler = asyncio.create_task(
            self._to_itself.send(bytearray(1), tag=tag, force_tag=True), name="kv-filler"
        )
        self._fillers.add(filler)
        filler.add_done_callback(self._filled)

    def _filled(self, filler: UcxMessage) -> None:
        self._fillers.discard(filler)
        if not filler.cancelled() and (error := filler.exception()):
            log.warning("a UCX receive stays open: %s", error)

    @property
    def transports(self) -> set[str]:
        """What this build of UCX can use here."""
        return set(self._ucxx.get_active_transports())

    async def _start(self, host: str, on_gpu: bool) -> None:
        options = ucx_options(host)
        for name, value in ucx_environment(on_gpu).items():
            os.environ.setdefault(name, value)
        try:
            self._ucxx = await finish(asyncio.to_thread(importlib.import_module, "ucxx"))
            # Without futures every pending message polls the event loop and burns a core.
            self.port = GuardedPorts()
            self.port.opened_by(
                lambda: self._ucxx.init(options, progress_mode="thread", enable_python_future=True)
            )
            worker = bytes(memoryview(self._ucxx.get_worker_address()))
            hosts = own_hosts(options.get("NET_DEVICES"))
            self.address = msgspec.msgpack.encode(UcxAddress(worker, hosts[:MAX_HOSTS]))
            self.port.admit(hosts)  # an endpoint to itself is a connection too
            self._to_itself = await self.open_endpoint(worker)
        except Exception as exc:  # ImportError, OSError of a library, UCXError of many kinds
            raise OperatorError(
                f"UCX does not work here: {exc}",
                remedy="run `snakemake check_ucx`, or set kv_transfer.transport to tcp",
            ) from exc
