"""Follows the registrations of a namespace, through every loss of etcd."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import NoReturn

from serving.discovery.etcd import FAILURES, RETRY_S, EtcdClient, reason
from serving.discovery.presence import Presence
from serving.discovery.records import Records
from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)

PULSE_S = 1.0


async def list_instances(etcd: EtcdClient, records: Records) -> tuple[int, list[InstanceInfo]]:
    """The revision of the list, and the instances by id. Raises one of FAILURES."""
    revision, stored = await etcd.list(records.instances)
    found = [records.decode(key, value) for key, value, _ in stored]
    return revision, [info for info in found if info is not None]


async def watch_instances(etcd: EtcdClient, records: Records, presence: Presence) -> NoReturn:
    """Keep `presence` current, until cancelled.

    A deletion that the watch sees counts at once, unless most instances are deleted together. A
    deletion that shows after etcd was away or stood still counts when the instance has not
    registered again within the grace period of `presence`: an etcd that came back empty, or whose
    leases ran out while it did nothing, must not empty the service.
    """
    reported = ""
    grace = False
    pulse = asyncio.create_task(_feel_pulse(etcd, records, presence), name="etcd-pulse")
    try:
        while True:
            try:
                revision, listed = await list_instances(etcd, records)
                reported = ""
                presence.replace(listed, grace=grace)
                await _follow(etcd, records, revision + 1, presence)
                grace = False  # the history was compacted, so the next list is complete
            except FAILURES as exc:
                grace = True
                presence.hold()
                if reported != (reported := type(exc).__name__):
                    log.warning("etcd at %s is away: %s", etcd.endpoint, reason(exc))
                await asyncio.sleep(RETRY_S)
    finally:
        pulse.cancel()
        presence.hold()


async def _feel_pulse(etcd: EtcdClient, records: Records, presence: Presence) -> NoReturn:
    """Notice when etcd stands still. Its watches look quiet then, and leases run out meanwhile."""
    while True:
        await asyncio.sleep(PULSE_S)
        try:
            await etcd.get(records.key("pulse"))
        except FAILURES:
            presence.distrust()


async def _follow(etcd: EtcdClient, records: Records, revision: int, presence: Presence) -> None:
    """Apply changes from `revision` on. Returns when etcd no longer has them."""
    async with aclosing(etcd.watch(records.instances, revision)) as changes:
        async for key, value in changes:
            if value is None:
                presence.deleted(records.instance_id(key))
            elif (info := records.decode(key, value)) is not None:
                presence.put(info)
