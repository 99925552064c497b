"""Turns lists and changes of registrations into instances that come up and go down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)

OnUp = Callable[[InstanceInfo], None]
OnDown = Callable[[str, int], None]
"""`on_down(instance_id, epoch)`."""


class Presence:
    """Reports each instance's up and down exactly once."""

    def __init__(self, on_up: OnUp, on_down: OnDown, grace_s: float) -> None:
        """`grace_s`: time to register again, for `replace` with `grace`."""
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
        self._report(lambda: self._on_up(info))

    def remove(self, instance_id: str) -> None:
        self._stay(instance_id)
        known = self._known.pop(instance_id, None)
        if known is not None:
            self._report(lambda: self._on_down(instance_id, known.epoch))

    def replace(self, listed: list[InstanceInfo], *, grace: bool) -> None:
        """Make `listed` the whole membership. With `grace`, missing instances may still register again."""
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
        """etcd is away: no instance goes down before the next list."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()

    def _stay(self, instance_id: str) -> None:
        if (timer := self._leaving.pop(instance_id, None)) is not None:
            timer.cancel()

    @staticmethod
    def _report(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a listener of membership failed")
