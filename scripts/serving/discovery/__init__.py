"""Discovery: who is alive, kept in etcd under leased keys.

A worker registers under `/{namespace}/instances/{instance_id}` (the value is `InstanceInfo` as
JSON) and disappears by itself when it stops renewing its lease. Losing etcd changes nothing for
anybody: watchers keep the last known membership, and registrations are made again when it is
back. This module does not know what instances are for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc
import grpc.aio
import msgspec
from etcd3aio._protobuf import WatchCreateRequest, WatchRequest, WatchStub
from etcd3aio.connections import ConnectionManager
from etcd3aio.errors import EtcdError
from etcd3aio.kv import KVService, prefix_range_end
from etcd3aio.lease import LeaseService

from serving.config.process import ETCD_SERVER_NAME, ControlServices
from serving.errors import OperatorError
from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)

CALL_S = 2.0
"""Deadline of a single exchange with etcd."""
RETRY_S = 0.25
MAX_BACKOFF_MS = 1000
"""gRPC would wait up to two minutes between attempts to reach an etcd that is back already."""

_REMEDY = "is etcd running? `snakemake status` tells, and the serve target starts it again"

OnUp = Callable[[InstanceInfo], None]
OnDown = Callable[[str, int], None]

_T = TypeVar("_T")
_FAILURES = (EtcdError, grpc.aio.AioRpcError, TimeoutError, OSError)


class _Superseded(Exception):
    """A newer registration holds our key."""


class Discovery:
    """One process' view of the instances of a namespace, and its own registration among them."""

    def __init__(
        self, channel: grpc.aio.Channel, endpoint: str, namespace: str, lease_s: int
    ) -> None:
        self._channel, self._endpoint = channel, endpoint
        self._kv = KVService(channel, max_attempts=1)
        self._leases = LeaseService(channel, max_attempts=1)
        self._watches = WatchStub(channel)
        self._root = f"/{namespace}/"
        self._prefix = f"{self._root}instances/"
        self._lease_s = lease_s
        self._lease_id = 0
        self._registration: asyncio.Task[None] | None = None
        self._obstacle = ""

    @classmethod
    def of(cls, control: ControlServices) -> AbstractAsyncContextManager[Discovery]:
        """As `connect`, for what a program was told."""
        return cls.connect(
            control.etcd_endpoint,
            control.namespace,
            lease_s=control.lease_s,
            join_file=control.etcd_join_file,
        )

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, endpoint: str, namespace: str, *, lease_s: int = 10, join_file: str = ""
    ) -> AsyncIterator[Discovery]:
        """`endpoint` is host:port. Enters at once, whether or not etcd is there.

        `join_file` has the certificates for mutual TLS, for an etcd off loopback. On the way out
        what was registered is unregistered. Raises OSError for a file that cannot be read.
        """
        manager = ConnectionManager([endpoint])
        manager.grpc_options += [
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MS),
        ]
        if join_file:
            certificate, key, authority = read_join_file(join_file)
            channel = manager.get_channel(authority, key, certificate, ETCD_SERVER_NAME)
        else:
            channel = manager.get_channel()
        discovery = cls(channel, endpoint, namespace, lease_s)
        try:
            yield discovery
        finally:
            await discovery.unregister()
            await channel.close()

    @property
    def connected(self) -> bool:
        return self._channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY

    async def instances(self, deadline_s: float = 5.0) -> list[InstanceInfo]:
        """Who is registered now, by id. Raises OperatorError when etcd does not answer in time."""
        return (await self._insist(self._list, deadline_s))[1]

    async def publish(self, name: str, value: bytes, deadline_s: float = 5.0) -> None:
        """Keep `value` under `/{namespace}/{name}`, with no lease. Raises OperatorError."""
        await self._insist(
            lambda: self._kv.put(f"{self._root}{name}", value, timeout=CALL_S), deadline_s
        )

    async def published(self, name: str, deadline_s: float = 5.0) -> bytes | None:
        """What `publish` was last given; None when it was not called. Raises OperatorError."""
        held = await self._insist(
            lambda: self._kv.get(f"{self._root}{name}", timeout=CALL_S), deadline_s
        )
        return held.kvs[0].value if held.kvs else None

    async def _insist(self, call: Callable[[], Awaitable[_T]], deadline_s: float) -> _T:
        """Again until it succeeds. Raises OperatorError when it has not in time."""
        reason = ""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    try:
                        return await call()
                    except _FAILURES as exc:
                        reason = f": {_reason(exc)}"
                        log.debug("etcd at %s%s", self._endpoint, reason)
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise OperatorError(
                f"etcd at {self._endpoint} did not answer within {deadline_s:g} s{reason}",
                remedy=_REMEDY,
            ) from None

    async def _list(self) -> tuple[int, list[InstanceInfo]]:
        """The revision that the list is of, and the instances by id."""
        answer = await self._kv.get(
            self._prefix, range_end=prefix_range_end(self._prefix), timeout=CALL_S
        )
        found = [self._decode(pair.key, pair.value) for pair in answer.kvs]
        return answer.header.revision, [info for info in found if info is not None]

    def _instance_id(self, key: bytes) -> str:
        return key.decode().removeprefix(self._prefix)

    def _decode(self, key: bytes, value: bytes) -> InstanceInfo | None:
        try:
            info = msgspec.json.decode(value, type=InstanceInfo)
        except msgspec.MsgspecError as exc:
            log.warning("ignored the value of %s: %s", key.decode(errors="replace"), exc)
            return None
        if info.instance_id != self._instance_id(key):
            log.warning("ignored the value of %r: it names %s", key, info.instance_id)
            return None
        return info

    # --- being seen ----------------------------------------------------------------------------

    async def register(self, info: InstanceInfo, *, deadline_s: float = 30.0) -> None:
        """Register and stay registered until `unregister`, whatever happens to etcd.

        Raises OperatorError when it does not succeed within `deadline_s`.
        """
        assert self._registration is None, "one registration per process"
        registered = asyncio.Event()
        self._registration = asyncio.create_task(
            self._stay_registered(info, registered), name="registration"
        )
        try:
            await asyncio.wait_for(registered.wait(), deadline_s)
        except TimeoutError:
            await self.unregister()
            raise OperatorError(
                f"{info.instance_id} could not register in etcd at {self._endpoint} "
                f"within {deadline_s:g} s: {self._obstacle}",
                remedy=_REMEDY,
            ) from None

    async def unregister(self) -> None:
        """Disappear at once; if etcd is away, when the lease ends. Harmless when not registered."""
        task, self._registration = self._registration, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        lease_id, self._lease_id = self._lease_id, 0
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("the registration failed", exc_info=exc)
        if lease_id:
            try:
                await self._leases.revoke(lease_id, timeout=CALL_S)
            except _FAILURES as exc:
                log.warning("the registration stays until its lease ends: %s", exc)

    async def _stay_registered(self, info: InstanceInfo, registered: asyncio.Event) -> None:
        while True:
            try:
                granted = await self._leases.grant(self._lease_s, timeout=CALL_S)
                self._lease_id = granted.ID
                await self._claim(info)
                log.info("registered %s (lease %x)", info.instance_id, granted.ID)
                self._obstacle = ""
                registered.set()
                await self._keep(info, granted.TTL)
                log.warning("%s: the lease is lost; registering again", info.instance_id)
            except (_Superseded, *_FAILURES) as exc:
                if registered.is_set() and isinstance(exc, _Superseded):
                    log.error("%s: %s; giving the id up", info.instance_id, exc)
                    return
                if self._obstacle != (reason := _reason(exc)):
                    log.warning("%s is not registered: %s", info.instance_id, reason)
                self._obstacle = reason
            await asyncio.sleep(RETRY_S)

    async def _claim(self, info: InstanceInfo) -> None:
        """Put our key under our lease, unless a newer registration holds it."""
        key = f"{self._prefix}{info.instance_id}"
        held = (await self._kv.get(key, timeout=CALL_S)).kvs
        if not held:
            unchanged = KVService.txn_compare_version(key, 0)
        else:
            other = self._decode(held[0].key, held[0].value)
            if other is not None and other.epoch > info.epoch:
                raise _Superseded(f"epoch {other.epoch} has registered, {info.epoch} is over")
            unchanged = KVService.txn_compare_value(key, held[0].value)
        put = KVService.txn_op_put(key, msgspec.json.encode(info), lease=self._lease_id)
        answer = await self._kv.txn([unchanged], [put], timeout=CALL_S, max_attempts=1)
        if not answer.succeeded:
            raise EtcdError(f"{key} changed meanwhile")

    async def _keep(self, info: InstanceInfo, ttl_s: float) -> None:
        """Renew until the lease is lost, by our own clock: nobody tells while etcd is away."""
        deadline = time.monotonic() + ttl_s
        pause_s = ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            asked = time.monotonic()
            try:
                ttl_s = await self._renew()
                if ttl_s <= 0:
                    return
                await self._check_key(info)
                deadline, pause_s = asked + ttl_s, ttl_s / 3
            except _FAILURES as exc:
                log.debug("lease not renewed: %s", exc)
                if time.monotonic() > deadline:
                    return
                pause_s = RETRY_S

    async def _renew(self) -> int:
        """Remaining seconds; 0 when etcd does not know the lease."""
        call = self._leases.keep_alive(self._lease_id)
        try:
            async with asyncio.timeout(CALL_S):
                async for answer in call:
                    return int(answer.TTL)
        finally:
            call.cancel()
        return 0

    async def _check_key(self, info: InstanceInfo) -> None:
        """A key that somebody deleted or took over while the lease lives is claimed again."""
        held = (await self._kv.get(f"{self._prefix}{info.instance_id}", timeout=CALL_S)).kvs
        if not held or held[0].lease != self._lease_id:
            log.warning("%s: the key is not ours any more; claiming it", info.instance_id)
            await self._claim(info)

    # --- seeing --------------------------------------------------------------------------------

    async def watch(self, on_up: OnUp, on_down: OnDown) -> NoReturn:
        """Report who comes and who goes (id, epoch), from all who are there now on; never returns.

        A deletion seen live counts at once. One that is only found after etcd was away counts
        when the instance has not registered again within a lease: an etcd that came back empty
        must not empty the service.
        """
        membership = _Membership(on_up, on_down, grace_s=self._lease_s + MAX_BACKOFF_MS / 1000)
        reported = ""
        grace = False
        try:
            while True:
                try:
                    revision, listed = await self._list()
                    reported = ""
                    membership.replace(listed, grace=grace)
                    await self._follow(revision + 1, membership)
                    grace = False  # the history was compacted; the next list is the truth
                except _FAILURES as exc:
                    grace = True
                    membership.hold()
                    if reported != (reported := type(exc).__name__):
                        log.warning("etcd at %s is away: %s", self._endpoint, _reason(exc))
                    await asyncio.sleep(RETRY_S)
        finally:
            membership.hold()

    async def _follow(self, revision: int, membership: _Membership) -> None:
        """Apply events from `revision` on; returns when etcd no longer has them."""
        # Not the library's own watch: it reconnects silently and goes on from the old revision,
        # which means nothing to an etcd that lost its data.
        call = self._watches.Watch()
        try:
            create = WatchCreateRequest(
                key=self._prefix.encode(),
                range_end=prefix_range_end(self._prefix),
                start_revision=revision,
            )
            await call.write(WatchRequest(create_request=create))
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.canceled:
                    log.info("the watch was cancelled (%s); listing again", response.cancel_reason)
                    return
                for event in response.events:
                    if event.type == event.DELETE:
                        membership.remove(self._instance_id(event.kv.key))
                    elif (info := self._decode(event.kv.key, event.kv.value)) is not None:
                        membership.put(info)
        finally:
            call.cancel()
        raise ConnectionError("the watch ended")


class _Membership:
    """Turns lists and events into ups and downs, each exactly once."""

    def __init__(self, on_up: OnUp, on_down: OnDown, grace_s: float) -> None:
        self._on_up, self._on_down, self._grace_s = on_up, on_down, grace_s
        self._known: dict[str, InstanceInfo] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    def put(self, info: InstanceInfo) -> None:
        """A newer registration replaces the older one; an older one is ignored."""
        known = self._known.get(info.instance_id)
        if known is not None and info.epoch < known.epoch:
            log.warning("ignored epoch %d of %s: it is over", info.epoch, info.instance_id)
            return
        self._stay(info.instance_id)
        if known == info:
            return
        if known is not None:
            self.remove(info.instance_id)
        self._known[info.instance_id] = info
        self._tell(lambda: self._on_up(info))

    def remove(self, instance_id: str) -> None:
        self._stay(instance_id)
        known = self._known.pop(instance_id, None)
        if known is not None:
            self._tell(lambda: self._on_down(instance_id, known.epoch))

    def replace(self, listed: list[InstanceInfo], *, grace: bool) -> None:
        """`listed` is the truth; with `grace`, who is missing may still register again."""
        for missing in self._known.keys() - {info.instance_id for info in listed}:
            if grace:
                log.warning("%s is not registered any more; waiting for it", missing)
                self._leaving[missing] = asyncio.get_running_loop().call_later(
                    self._grace_s, self.remove, missing
                )
            else:
                self.remove(missing)
        for info in listed:
            self.put(info)

    def hold(self) -> None:
        """etcd is away: nobody leaves until it has been asked again."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()

    def _stay(self, instance_id: str) -> None:
        if (timer := self._leaving.pop(instance_id, None)) is not None:
            timer.cancel()

    @staticmethod
    def _tell(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a listener of membership failed")


def read_join_file(path: str) -> tuple[bytes, bytes, bytes]:
    """A node's certificate, its key, and the certificate of the authority that signed it (PEM)."""
    own, begin, authority = Path(path).read_bytes().rpartition(b"-----BEGIN CERTIFICATE-----")
    certificate, begin_key, key = own.partition(b"-----BEGIN PRIVATE KEY-----")
    return certificate, begin_key + key, begin + authority


def _reason(exc: BaseException) -> str:
    if isinstance(exc, grpc.aio.AioRpcError):
        return str(exc.details() or exc.code().name)
    return str(exc) or type(exc).__name__
