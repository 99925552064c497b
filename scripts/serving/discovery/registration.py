"""Keeps one instance registered under a lease, whatever happens to etcd."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from serving.discovery.etcd import FAILURES, REMEDY, RETRY_S, EtcdClient, reason
from serving.discovery.records import Records
from serving.errors import OperatorError
from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)


class _Superseded(Exception):
    """A newer registration holds our key."""


class Registration:
    """From `start` until `end`, with one lease after the other."""

    def __init__(
        self, etcd: EtcdClient, records: Records, info: InstanceInfo, lease_s: int
    ) -> None:
        self._etcd, self._records, self._info, self._lease_s = etcd, records, info, lease_s
        self._key = records.instance_key(info.instance_id)
        self._lease_id = 0
        self._obstacle = ""  # why the last attempt failed
        self._registered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, deadline_s: float) -> None:
        """Register, and stay registered. Raises OperatorError at the deadline, and ends then."""
        self._task = asyncio.create_task(self._stay_registered(), name="registration")
        try:
            await asyncio.wait_for(self._registered.wait(), deadline_s)
        except TimeoutError:
            await self.end()
            raise OperatorError(
                f"{self._info.instance_id} could not register in etcd at {self._etcd.endpoint} "
                f"within {deadline_s:g} s: {self._obstacle}",
                remedy=REMEDY,
            ) from None

    async def end(self) -> None:
        """Disappear at once; if etcd is away, when the lease ends."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        lease_id, self._lease_id = self._lease_id, 0
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("the registration failed", exc_info=exc)
        if lease_id:
            try:
                await self._etcd.revoke_lease(lease_id)
            except FAILURES as exc:
                log.warning("the registration stays until its lease ends: %s", exc)

    async def _stay_registered(self) -> None:
        name = self._info.instance_id
        while True:
            try:
                self._lease_id, ttl_s = await self._etcd.grant_lease(self._lease_s)
                await self._claim()
                log.info("registered %s (lease %x)", name, self._lease_id)
                self._obstacle = ""
                self._registered.set()
                await self._renew_until_lost(ttl_s)
                log.warning("%s: the lease is lost; registering again", name)
            except (_Superseded, *FAILURES) as exc:
                if self._registered.is_set() and isinstance(exc, _Superseded):
                    log.error("%s: %s; it does not register again", name, exc)
                    return
                if self._obstacle != (obstacle := reason(exc)):
                    log.warning("%s is not registered: %s", name, obstacle)
                self._obstacle = obstacle
            await asyncio.sleep(RETRY_S)

    async def _claim(self) -> None:
        """Put our key under our lease, unless a newer registration holds it."""
        held = await self._etcd.get(self._key)
        if held is not None:
            other = self._records.decode(held.key, held.value)
            if other is not None and other.epoch > self._info.epoch:
                raise _Superseded(f"epoch {other.epoch} has registered, {self._info.epoch} is over")
        old = held.value if held is not None else None
        await self._etcd.replace(self._key, old, msgspec.json.encode(self._info), self._lease_id)

    async def _renew_until_lost(self, ttl_s: float) -> None:
        """Returns when the lease is lost by our own clock: while etcd is away, nothing else counts."""
        deadline = time.monotonic() + ttl_s
        pause_s = ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            asked = time.monotonic()
            try:
                ttl_s = await self._etcd.renew_lease(self._lease_id)
                if ttl_s <= 0:
                    return
                await self._check_key()
                deadline, pause_s = asked + ttl_s, ttl_s / 3
            except FAILURES as exc:
                log.debug("lease not renewed: %s", exc)
                if time.monotonic() > deadline:
                    return
                pause_s = RETRY_S

    async def _check_key(self) -> None:
        """Claim the key again if somebody deleted it or took it over while the lease lives."""
        held = await self._etcd.get(self._key)
        if held is None or held.lease_id != self._lease_id:
            log.warning("%s: the key is not ours any more; claiming it", self._info.instance_id)
            await self._claim()
