"""A client of etcd: values, leases and watches. The only module that knows etcd's libraries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import grpc
import grpc.aio
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest, WatchStub
from etcd3aio.connections import ConnectionManager
from etcd3aio.errors import EtcdError
from etcd3aio.kv import KVService, prefix_range_end
from etcd3aio.lease import LeaseService

from serving.config.process import ETCD_SERVER_NAME
from serving.errors import OperatorError

log = logging.getLogger(__name__)

CALL_S = 2.0
"""Deadline of a single exchange with etcd."""
RETRY_S = 0.25
MAX_BACKOFF_S = 1.0
"""gRPC would wait up to two minutes between attempts to reach an etcd that is back already."""
REMEDY = "is etcd running? `snakemake status` shows it, and the serve target starts it again"
FAILURES = (EtcdError, grpc.aio.AioRpcError, TimeoutError, OSError)
"""How an exchange with etcd fails."""

T = TypeVar("T")


class Stored(NamedTuple):
    """A key with its value; `lease_id` 0: no lease."""

    key: bytes
    value: bytes
    lease_id: int


class GrantedLease(NamedTuple):
    lease_id: int
    ttl_s: int


class EtcdClient:
    """Calls raise one of FAILURES, unless they say otherwise, and do not repeat by themselves."""

    def __init__(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        self.endpoint = endpoint
        self._channel = channel
        self._kv = KVService(channel, max_attempts=1)
        self._leases = LeaseService(channel, max_attempts=1)
        self._watches = WatchStub(channel)

    @classmethod
    @asynccontextmanager
    async def connect(cls, endpoint: str, join_file: str = "") -> AsyncIterator[Self]:
        """`endpoint` is host:port. Enters at once, whether or not etcd is there.

        `join_file` has the certificates for mutual TLS, for an etcd off loopback. Raises OSError for
        a file that cannot be read.
        """
        manager = ConnectionManager([endpoint])
        manager.grpc_options += [
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", int(MAX_BACKOFF_S * 1000)),
            # A proxy of the environment is for the world outside, never for our own programs.
            ("grpc.enable_http_proxy", 0),
        ]
        if join_file:
            certificate, key, authority = read_join_file(join_file)
            channel = manager.get_channel(authority, key, certificate, ETCD_SERVER_NAME)
        else:
            channel = manager.get_channel()
        try:
            yield cls(channel, endpoint)
        finally:
            await channel.close()

    @property
    def connected(self) -> bool:
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    async def retry(self, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        """Repeat `call` until it succeeds. Raises OperatorError at the deadline."""
        last = ""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    try:
                        return await call()
                    except FAILURES as exc:
                        last = f": {reason(exc)}"
                        log.debug("etcd at %s%s", self.endpoint, last)
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise OperatorError(
                f"etcd at {self.endpoint} did not answer within {deadline_s:g} s{last}",
                remedy=REMEDY,
            ) from None

    # --- values --------------------------------------------------------------------------------

    async def get(self, key: str) -> Stored | None:
        found = (await self._kv.get(key, timeout=CALL_S)).kvs
        return Stored(found[0].key, found[0].value, found[0].lease) if found else None

    async def list(self, prefix: str) -> tuple[int, list[Stored]]:
        """The revision of the list, and all values under `prefix` by key."""
        answer = await self._kv.get(prefix, range_end=prefix_range_end(prefix), timeout=CALL_S)
        return answer.header.revision, [
            Stored(pair.key, pair.value, pair.lease) for pair in answer.kvs
        ]

    async def put(self, key: str, value: bytes) -> None:
        await self._kv.put(key, value, timeout=CALL_S)

    async def replace(self, key: str, old: bytes | None, new: bytes, lease_id: int) -> None:
        """Put `new` under a lease, if the value still is `old` (None: there is no such key)."""
        if old is None:
            unchanged = KVService.txn_compare_version(key, 0)
        else:
            unchanged = KVService.txn_compare_value(key, old)
        put = KVService.txn_op_put(key, new, lease=lease_id)
        answer = await self._kv.txn([unchanged], [put], timeout=CALL_S, max_attempts=1)
        if not answer.succeeded:
            raise EtcdError(f"{key} changed meanwhile")

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[tuple[bytes, bytes | None]]:
        """Key and value (None: deleted) of each change under `prefix`, from `revision` on.

        Ends when etcd no longer has that revision. Raises one of FAILURES when the connection ends.
        """
        # Not the library's own watch: it reconnects silently and continues from the old revision,
        # which means nothing to an etcd that lost its data.
        call = self._watches.Watch()
        try:
            create = WatchCreateRequest(
                key=prefix.encode(),
                range_end=prefix_range_end(prefix),
                start_revision=revision,
            )
            await call.write(WatchRequest(create_request=create))
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.canceled:
                    log.info("the watch was cancelled (%s); listing again", response.cancel_reason)
                    return
                for event in response.events:
                    deleted = event.type == event.DELETE
                    yield event.kv.key, None if deleted else event.kv.value
        finally:
            call.cancel()
        raise ConnectionError("the watch ended")

    # --- leases --------------------------------------------------------------------------------

    async def grant_lease(self, ttl_s: int) -> GrantedLease:
        granted = await self._leases.grant(ttl_s, timeout=CALL_S)
        return GrantedLease(granted.ID, granted.TTL)

    async def renew_lease(self, lease_id: int) -> int:
        """Remaining seconds; 0 when etcd does not know the lease."""
        call = self._leases.keep_alive(lease_id)
        try:
            async with asyncio.timeout(CALL_S):
                async for answer in call:
                    return int(answer.TTL)
        finally:
            call.cancel()
        return 0

    async def revoke_lease(self, lease_id: int) -> None:
        await self._leases.revoke(lease_id, timeout=CALL_S)


def read_join_file(path: str) -> tuple[bytes, bytes, bytes]:
    """A node's certificate, its key, and the certificate of the authority that signed it (PEM)."""
    own, begin, authority = Path(path).read_bytes().rpartition(b"-----BEGIN CERTIFICATE-----")
    certificate, begin_key, key = own.partition(b"-----BEGIN PRIVATE KEY-----")
    return certificate, begin_key + key, begin + authority


def reason(exc: BaseException) -> str:
    """A failure's reason, for people."""
    if isinstance(exc, grpc.aio.AioRpcError):
        return str(exc.details() or exc.code().name)
    return str(exc) or type(exc).__name__
