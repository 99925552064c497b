"""Turns lists and changes of registrations into instances that come up and go down."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)

OnUp = Callable[[InstanceInfo], None]
OnDown = Callable[[str, int], None]
"""`on_down(instance_id, epoch)`."""


MASS_S = 2.0
"""Deletions within this time count as one event."""


class Presence:
    """Reports each instance's up and down exactly once.

    One registration that is deleted says that its instance leaves. When most of them are deleted
    together, or etcd has just been away, it is etcd that lost them: the instances stay up, and get
    a grace period to register again.
    """

    def __init__(self, on_up: OnUp, on_down: OnDown, grace_s: float) -> None:
        """`grace_s`: time to register again."""
        self._on_up, self._on_down, self._grace_s = on_up, on_down, grace_s
        self._known: dict[str, InstanceInfo] = {}
        self._leaving: dict[str, asyncio.TimerHandle] = {}
        self._deleted: dict[str, tuple[float, InstanceInfo]] = {}
        self._distrusted_until = -math.inf

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
        self._report(lambda: self._on_up(info))

    def remove(self, instance_id: str) -> None:
        self._stay(instance_id)
        known = self._known.pop(instance_id, None)
        if known is not None:
            self._report(lambda: self._on_down(instance_id, known.epoch))

    def deleted(self, instance_id: str) -> None:
        """Its registration was deleted. It goes down at once, unless etcd is to blame."""
        known = self._known.get(instance_id)
        if known is None:
            return
        now = asyncio.get_running_loop().time()
        self._deleted = {
            name: (since, info)
            for name, (since, info) in self._deleted.items()
            if now - since <= MASS_S and name not in self._known
        }
        num_before = len(self._known) + len(self._deleted)
        num_deleted = len(self._deleted) + len(self._leaving.keys() | {instance_id})
        if now < self._distrusted_until:
            self._wait_for(instance_id)
        elif 2 * num_deleted > num_before:
            self._wait_for(instance_id)
            for _, info in self._deleted.values():
                self.put(info)
                self._wait_for(info.instance_id)
            self._deleted.clear()
        else:
            self._deleted[instance_id] = now, known
            self.remove(instance_id)

    def distrust(self) -> None:
        """etcd does not answer: for a grace period, what it deletes may register again."""
        self._distrusted_until = asyncio.get_running_loop().time() + self._grace_s

    def replace(self, listed: list[InstanceInfo], *, grace: bool) -> None:
        """Make `listed` the whole membership. With `grace`, missing instances may still register again."""
        for missing in self._known.keys() - {info.instance_id for info in listed}:
            if grace:
                self._wait_for(missing)
            else:
                self.remove(missing)
        for info in listed:
            self.put(info)

    def hold(self) -> None:
        """etcd is away: no instance goes down before the next list."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()

    def _wait_for(self, instance_id: str) -> None:
        self._stay(instance_id)
        log.warning("%s is not registered any more; waiting for it", instance_id)
        self._leaving[instance_id] = asyncio.get_running_loop().call_later(
            self._grace_s, self.remove, instance_id
        )

    def _stay(self, instance_id: str) -> None:
        if (timer := self._leaving.pop(instance_id, None)) is not None:
            timer.cancel()

    @staticmethod
    def _report(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a listener of membership failed")
