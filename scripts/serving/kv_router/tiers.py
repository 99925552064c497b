"""One instance's device and host memory, as the one set of blocks that the prefix index knows.

A block that is left in either tier is still a hit, so the index hears of a removal only when
neither tier holds it any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.kv_router.prefix_index import PrefixIndex
from serving.protocol import BlocksRemoved, BlocksStored, KvEvent


class InstanceTiers:
    """Remembers only what is in the host tier: an instance without one costs nothing here."""

    def __init__(self, index: PrefixIndex, instance_id: str) -> None:
        self._index, self._instance_id = index, instance_id
        self._on_host: dict[int, bool] = {}  # hash -> whether the device holds it as well

    def apply(self, event: KvEvent) -> None:
        if isinstance(event, BlocksStored):
            self._store(event)
        elif isinstance(event, BlocksRemoved):
            self._remove(event)
        else:
            self._on_host.clear()
            self._index.clear(self._instance_id)

    def replace(self, device: Sequence[int], host: Sequence[int]) -> None:
        """The instance holds exactly these."""
        on_device = set(device) if host else frozenset()
        self._on_host = {value: value in on_device for value in host}
        only_on_host = [value for value, is_on_device in self._on_host.items() if not is_on_device]
        self._index.replace(self._instance_id, [*device, *only_on_host])

    def _store(self, event: BlocksStored) -> None:
        if event.tier == "host":  # the device holds them still, so the index has them
            self._on_host.update(dict.fromkeys(event.block_hashes, True))
            return
        if self._on_host:
            for value in self._on_host.keys() & event.block_hashes:
                self._on_host[value] = True
        self._index.store(self._instance_id, event.block_hashes)

    def _remove(self, event: BlocksRemoved) -> None:
        gone = event.block_hashes
        if event.tier == "host":
            gone = [value for value in gone if not self._on_host.pop(value, True)]
        elif self._on_host:
            kept = self._on_host.keys() & gone
            self._on_host.update(dict.fromkeys(kept, False))
            gone = [value for value in gone if value not in kept]
        self._index.remove(self._instance_id, gone)
