"""Keys and values of a namespace in etcd."""

from __future__ import annotations

import logging

import msgspec

from serving.protocol import InstanceInfo

log = logging.getLogger(__name__)


class Records:
    """`/{namespace}/{name}` for values without a lease, `/{namespace}/instances/{id}` for instances."""

    def __init__(self, namespace: str) -> None:
        self._root = f"/{namespace}/"
        self.instances = f"{self._root}instances/"

    def key(self, name: str) -> str:
        return f"{self._root}{name}"

    def instance_key(self, instance_id: str) -> str:
        return f"{self.instances}{instance_id}"

    def instance_id(self, key: bytes) -> str:
        return key.decode(errors="replace").removeprefix(self.instances)

    def decode(self, key: bytes, value: bytes) -> InstanceInfo | None:
        """The instance under `key`. Logs a warning and returns None for any other value."""
        try:
            info = msgspec.json.decode(value, type=InstanceInfo)
        except msgspec.MsgspecError as exc:
            log.warning("ignored the value of %s: %s", key.decode(errors="replace"), exc)
            return None
        if info.instance_id != self.instance_id(key):
            log.warning("ignored the value of %r: it names %s", key, info.instance_id)
            return None
        return info
