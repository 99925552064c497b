"""What a router knows of the instances: who is alive, what each holds, how loaded it is.

Instances come, go and restart; their events arrive late, twice or not at all. This module keeps
the picture true, and knows nothing of requests. No I/O, no tasks; all calls belong on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from serving.block_hash import root_hash
from serving.config import RouterConfig
from serving.errors import InstanceRefused
from serving.kv_router.breaker import Breaker, State
from serving.kv_router.event_stream import IndexCounters, KvEventStream
from serving.kv_router.load import InstanceLoad, Load
from serving.kv_router.peers import PeerRouters
from serving.kv_router.prefix_index import PrefixIndex
from serving.load_report import LoadReport
from serving.protocol import InstanceInfo, KvEventBatch, ModelCard, Role


class InstanceState(NamedTuple):
    """What the router knows of an instance, for status and metrics."""

    info: InstanceInfo
    load: Load
    last_report: LoadReport | None
    indexed_blocks: int
    synchronised: bool
    breaker: State
    openings: int


class Instance:
    """One registration of an instance, with the state that the router keeps for it."""

    __slots__ = ("breaker", "events", "info", "instance_id", "load", "registration")

    def __init__(self, info: InstanceInfo, events: KvEventStream, rng: Random) -> None:
        self.info, self.instance_id, self.events = info, info.instance_id, events
        self.registration = xxh3_64_intdigest(f"{info.instance_id} {info.epoch}".encode())
        self.load = InstanceLoad()
        self.breaker = Breaker(rng)


class Membership:
    """The instances, and what they report about themselves.

    Instances must agree with each other, and with `block_size`, `hash_salt` and the served name
    `model` where given: otherwise their hashes would never match and KV routing would be silently
    inert. `refused` maps instances that do not agree to the reason. When the last accepted
    instance is gone, the next one sets the terms anew.

    The index is fed only under the `kv` policy; the others ignore events and need no snapshots.
    `clock` gives seconds, monotonic.
    """

    def __init__(
        self,
        config: RouterConfig,
        block_size: int | None = None,
        hash_salt: str | None = None,
        *,
        model: str | None = None,
        rng: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self._rng = rng or Random()
        self._required: dict[str, str | int | None] = {
            "block size": block_size,
            "hash salt": hash_salt,
            "model": model,
        }
        self.refused: dict[str, str] = {}
        self.counters = IndexCounters()
        self._card: ModelCard | None = (
            None  # of the first accepted instance, while there is instance
        )
        self._root = 0
        self._index = PrefixIndex(config.index_max_blocks)
        self._instances: dict[str, Instance] = {}
        self._clock = clock
        self._by_registration: dict[int, Instance] = {}
        self.peers: PeerRouters | None = None
        """The routers of other frontend processes, if there are any."""

    @property
    def uses_index(self) -> bool:
        return self.config.policy == "kv"

    @property
    def indexed_blocks(self) -> int:
        """Distinct blocks in the index."""
        return len(self._index)

    @property
    def evicted_blocks(self) -> int:
        """Blocks that the index evicted because it was full."""
        return self._index.evicted

    def indexed(self, instance_id: str) -> set[int]:
        """Blocks that the index knows to be on the device of an instance, for audits."""
        return self._index.blocks(instance_id)

    # --- membership -----------------------------------------------------------------------------

    def add_instance(self, info: InstanceInfo) -> None:
        """Route to this instance from now on. A newer epoch replaces an older one; an older
        epoch is ignored.

        Raises InstanceRefused, after noting it in `refused`, when it does not agree.
        """
        known = self._instances.get(info.instance_id)
        if known is not None:
            if info.epoch < known.info.epoch:
                self.counters.stale_epoch += 1
                return
            if info == known.info:
                return
            self._forget(info.instance_id)
        if reason := self._mismatch(info):
            self.refused[info.instance_id] = reason
            raise InstanceRefused(info.instance_id, reason)
        self.refused.pop(info.instance_id, None)
        if self._card is None:
            self._card, self._root = info.model, root_hash(info.model.hash_salt)
        events = KvEventStream(self._index, info.instance_id, self.counters)
        instance = self._instances[info.instance_id] = Instance(info, events, self._rng)
        self._by_registration[instance.registration] = instance

    def remove_instance(self, instance_id: str, epoch: int) -> None:
        """The registration is gone: no more requests go there. Routes that exist stay valid."""
        known = self._instances.get(instance_id)
        if known is None:
            self.refused.pop(instance_id, None)
        elif epoch < known.info.epoch:
            self.counters.stale_epoch += 1
        else:
            self._forget(instance_id)

    def failed(self, instance_id: str, epoch: int) -> None:
        """Its connection broke, or it was silent past a deadline: avoid it for a while, unless no
        other instance has its role (`breaker.py`)."""
        if known := self._instance(instance_id, epoch):
            known.breaker.failed(self._clock())

    def answered_error(self, instance_id: str, epoch: int) -> None:
        """It ended a request with an error of its own."""
        if known := self._instance(instance_id, epoch):
            known.breaker.answered_error(self._clock())

    def instances(self, role: Role, *, exclude: Collection[str] = ()) -> list[InstanceInfo]:
        """Accepted instances of a role, the oldest registration first."""
        return [
            instance.info
            for instance_id, instance in self._instances.items()
            if instance.info.role == role and instance_id not in exclude
        ]

    def state(self) -> list[InstanceState]:
        """Everything known, for status and metrics."""
        self._read_peer_decisions()
        now_s = self._clock()
        return [
            InstanceState(
                instance.info,
                instance.load.estimate(now_s),
                instance.load.last_report,
                self._index.num_blocks(instance_id),
                instance.events.synchronised,
                instance.breaker.state(now_s),
                instance.breaker.openings,
            )
            for instance_id, instance in self._instances.items()
        ]

    # --- what instances report--------------------------------------------------------------------

    def on_kv(self, batch: KvEventBatch) -> bool:
        """Apply a batch of KV events; True: the instance needs a snapshot.

        It needs one from its registration or from a gap on, until the numbers close up. Batches of
        an unknown instance or another epoch are counted and ignored.
        """
        if not self.uses_index:
            return False
        known = self._of_epoch(batch.instance_id, batch.epoch)
        if known is None:
            return False
        known.events.on_batch(batch)
        return not known.events.synchronised

    def on_snapshot(
        self,
        instance_id: str,
        epoch: int,
        seq: int,
        block_hashes: Sequence[int],
        host_hashes: Sequence[int] = (),
    ) -> bool:
        """Take over all that an instance held as of `seq`, by tier; True: it needs another
        snapshot, because batches after it are missing too."""
        if not self.uses_index:
            return False
        known = self._of_epoch(instance_id, epoch)
        if known is None:
            return False
        known.events.on_snapshot(seq, block_hashes, host_hashes)
        return not known.events.synchronised

    def needs_snapshot(self) -> list[str]:
        """Instances whose part of the index may be incomplete."""
        if not self.uses_index:
            return []
        return [
            instance_id
            for instance_id, instance in self._instances.items()
            if not instance.events.synchronised
        ]

    def distrust_index(self) -> None:
        """Events may have been lost unseen (the event plane reconnected): all instances need a
        snapshot. What is indexed stays in use meanwhile."""
        for instance in self._instances.values():
            instance.events.distrust()

    def on_load(self, report: LoadReport) -> None:
        """Take over a load report; instance of another epoch is counted and ignored."""
        known = self._of_epoch(report.instance_id, report.epoch)
        if known is not None:
            known.load.report(report, self._clock())

    def _read_peer_decisions(self) -> None:
        """Count what peer routers have sent; they may know instances that we do not."""
        if self.peers is None:
            return
        for decision in self.peers.updates():
            known = self._by_registration.get(decision.registration)
            if known is not None:
                load = Load(decision.queued_tokens, decision.blocks, 1)
                known.load.add_peer_request(load, decision.decided_s, self._clock())

    def _instance(self, instance_id: str, epoch: int) -> Instance | None:
        """None when it is gone or has restarted: a new process starts without failures."""
        known = self._instances.get(instance_id)
        return known if known is not None and known.info.epoch == epoch else None

    def _of_epoch(self, instance_id: str, epoch: int) -> Instance | None:
        known = self._instances.get(instance_id)
        if known is None or epoch > known.info.epoch:
            self.counters.unregistered += 1
            return None
        if epoch < known.info.epoch:
            self.counters.stale_epoch += 1
            return None
        return known

    def _forget(self, instance_id: str) -> None:
        del self._by_registration[self._instances.pop(instance_id).registration]
        self._index.remove_instance(instance_id)
        if not self._instances:
            self._card = None

    def _mismatch(self, info: InstanceInfo) -> str:
        """What the instance does not agree with; empty when it fits."""
        required = self._required if self._card is None else _terms(self._card)
        return "; ".join(
            f"{what} is {theirs!r}, but {required[what]!r} is served here"
            for what, theirs in _terms(info.model).items()
            if required[what] not in (None, theirs)
        )


def _terms(card: ModelCard) -> dict[str, str | int | None]:
    """What must be equal for block hashes to mean the same."""
    return {"block size": card.block_size, "hash salt": card.hash_salt, "model": card.name}
