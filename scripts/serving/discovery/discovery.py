"""One process' view of the instances of a namespace, and its own registration among them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NoReturn

from serving.config.process import ControlServices
from serving.discovery.etcd import MAX_BACKOFF_S, EtcdClient
from serving.discovery.presence import OnDown, OnUp, Presence
from serving.discovery.records import Records
from serving.discovery.registration import Registration
from serving.discovery.watch import list_instances, watch_instances
from serving.errors import OperatorError
from serving.protocol import InstanceInfo


class Discovery:
    """Holds at most one registration."""

    def __init__(self, etcd: EtcdClient, namespace: str, lease_s: int) -> None:
        self._etcd, self._records, self._lease_s = etcd, Records(namespace), lease_s
        self._registration: Registration | None = None

    @classmethod
    def from_settings(cls, control: ControlServices) -> AbstractAsyncContextManager[Discovery]:
        """As `connect`, with the settings of a process."""
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
        this unregisters. Raises OSError for a file that cannot be read.
        """
        async with EtcdClient.connect(endpoint, join_file) as etcd:
            discovery = cls(etcd, namespace, lease_s)
            try:
                yield discovery
            finally:
                await discovery.unregister()

    @property
    def connected(self) -> bool:
        return self._etcd.connected

    async def instances(self, deadline_s: float = 5.0) -> list[InstanceInfo]:
        """The registered instances, by id. Raises OperatorError when etcd does not answer in time."""
        found = await self._etcd.retry(
            lambda: list_instances(self._etcd, self._records), deadline_s
        )
        return found[1]

    async def publish(self, name: str, value: bytes, deadline_s: float = 5.0) -> None:
        """Keep `value` under `/{namespace}/{name}`, with no lease. Raises OperatorError."""
        key = self._records.key(name)
        await self._etcd.retry(lambda: self._etcd.put(key, value), deadline_s)

    async def published(self, name: str, deadline_s: float = 5.0) -> bytes | None:
        """The value that `publish` kept last; None if there is none. Raises OperatorError."""
        key = self._records.key(name)
        stored = await self._etcd.retry(lambda: self._etcd.get(key), deadline_s)
        return stored.value if stored is not None else None

    async def register(self, info: InstanceInfo, *, deadline_s: float = 30.0) -> None:
        """Register and stay registered until `unregister`, whatever happens to etcd.

        Raises OperatorError when it does not succeed within `deadline_s`.
        """
        assert self._registration is None, "one registration per process"
        registration = Registration(self._etcd, self._records, info, self._lease_s)
        self._registration = registration
        try:
            await registration.start(deadline_s)
        except OperatorError:
            self._registration = None
            raise

    async def unregister(self) -> None:
        """Disappear at once; if etcd is away, when the lease ends. Harmless when not registered."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.end()

    async def watch(self, on_up: OnUp, on_down: OnDown) -> NoReturn:
        """Report the instances that are there now, and each one that comes or goes; never returns.

        While etcd is away, and for a lease after it is back, no instance goes down.
        """
        presence = Presence(on_up, on_down, grace_s=self._lease_s + MAX_BACKOFF_S)
        await watch_instances(self._etcd, self._records, presence)
