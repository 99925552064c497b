"""The KV router: which instance gets a request.

Joins the prefix index, the load of each instance and the policy, and keeps them true while
instances come, go and restart. It is told everything (discovery, KV events, load reports) and asks
for nothing: no I/O, no tasks. All calls belong on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from serving.block_hash import chain, root_hash
from serving.config import RouterConfig
from serving.errors import InstanceRefused, NoInstances
from serving.kv_router.load import InstanceLoad, Load
from serving.kv_router.policy import PromptSize, select
from serving.kv_router.prefix_index import PrefixIndex
from serving.kv_router.route import PromptHashes, Route
from serving.kv_router.sequence import EventSequence, IndexCounters
from serving.protocol import InstanceInfo, KvEventBatch, LoadReport, ModelCard, Role

__all__ = ["InstanceState", "KvRouter", "PromptHashes", "Route"]


class InstanceState(NamedTuple):
    """What the router knows of an instance, for status and metrics."""

    info: InstanceInfo
    load: Load
    last_report: LoadReport | None
    indexed_blocks: int
    synchronised: bool
    available: bool


class _Instance:
    __slots__ = ("events", "info", "load", "unavailable_until_s")

    def __init__(self, info: InstanceInfo, events: EventSequence) -> None:
        self.info, self.events = info, events
        self.load = InstanceLoad()
        self.unavailable_until_s = 0.0


class KvRouter:
    """Instances, what they hold, how loaded they are; and the choice between them.

    Instances must agree with each other, and with `block_size`, `hash_salt` and the served name
    `model` where given: otherwise their hashes would never match and KV routing would be silently
    inert. Those that do not are in `refused`, with the reason. When the last accepted instance is
    gone, the next one decides anew what the others have to agree with.

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
        self._required: dict[str, str | int | None] = {
            "block size": block_size,
            "hash salt": hash_salt,
            "model": model,
        }
        self.refused: dict[str, str] = {}
        self.counters = IndexCounters()
        self._card: ModelCard | None = None  # of the first accepted instance, while there is one
        self._root = 0
        self._index = PrefixIndex()
        self._instances: dict[str, _Instance] = {}
        self._turns: dict[Role, int] = {"agg": 0, "prefill": 0, "decode": 0}
        self._rng, self._clock = rng or Random(), clock

    @property
    def uses_index(self) -> bool:
        return self.config.policy == "kv"

    @property
    def indexed_blocks(self) -> int:
        """Distinct blocks in the index."""
        return len(self._index)

    # --- membership -----------------------------------------------------------------------------

    def add_instance(self, info: InstanceInfo) -> None:
        """Route to this instance from now on. A newer epoch replaces what was known of an older
        one; an older epoch is ignored.

        Raises InstanceRefused, after noting it in `refused`, when it does not fit.
        """
        known = self._instances.get(info.instance_id)
        if known is not None:
            if info.epoch < known.info.epoch:
                self.counters.stale_epoch += 1
                return
            if info == known.info:
                return
            self._forget(info.instance_id)
        if reason := self._misfit(info):
            self.refused[info.instance_id] = reason
            raise InstanceRefused(info.instance_id, reason)
        self.refused.pop(info.instance_id, None)
        if self._card is None:
            self._card, self._root = info.model, root_hash(info.model.hash_salt)
        events = EventSequence(self._index, info.instance_id, self.counters)
        self._instances[info.instance_id] = _Instance(info, events)

    def remove_instance(self, instance_id: str, epoch: int) -> None:
        """The registration is gone: no more requests go there. Routes that exist stay valid."""
        known = self._instances.get(instance_id)
        if known is None:
            self.refused.pop(instance_id, None)
        elif epoch < known.info.epoch:
            self.counters.stale_epoch += 1
        else:
            self._forget(instance_id)

    def mark_unavailable(self, instance_id: str, until_s: float) -> None:
        """Avoid a draining or suspect instance until the clock shows `until_s` (`math.inf`: for
        good), unless nothing else has its role."""
        if known := self._instances.get(instance_id):
            known.unavailable_until_s = until_s

    def instances(self, role: Role, *, exclude: Collection[str] = ()) -> list[InstanceInfo]:
        """Accepted instances of a role, the oldest registration first."""
        return [
            one.info
            for instance_id, one in self._instances.items()
            if one.info.role == role and instance_id not in exclude
        ]

    def state(self) -> list[InstanceState]:
        """Everything known, for status and metrics."""
        now_s = self._clock()
        return [
            InstanceState(
                one.info,
                one.load.estimate(now_s),
                one.load.last_report,
                self._index.num_blocks(instance_id),
                one.events.synchronised,
                one.unavailable_until_s <= now_s,
            )
            for instance_id, one in self._instances.items()
        ]

    # --- what instances say ---------------------------------------------------------------------

    def on_kv(self, batch: KvEventBatch) -> bool:
        """Apply a batch of KV events; True: the instance needs a snapshot.

        That is so from its registration or from a gap on until the numbers close up. Batches of
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
        snapshot, because batches after this one are missing too."""
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
            for instance_id, one in self._instances.items()
            if not one.events.synchronised
        ]

    def distrust_index(self) -> None:
        """Events may have been lost unseen (the event plane reconnected): all instances need a
        snapshot. What is indexed stays in use meanwhile."""
        for one in self._instances.values():
            one.events.distrust()

    def on_load(self, report: LoadReport) -> None:
        """Take over a load report; one of another epoch is counted and ignored."""
        known = self._of_epoch(report.instance_id, report.epoch)
        if known is not None:
            known.load.report(report, self._clock())

    # --- requests -------------------------------------------------------------------------------

    def hash(self, token_ids: Sequence[int] | np.ndarray) -> PromptHashes:
        """Hash a prompt once, to be routed as often as needed."""
        if self._card is None or not self.uses_index:
            return PromptHashes(len(token_ids), [])
        return PromptHashes(len(token_ids), chain(token_ids, self._card.block_size, self._root))

    def route(
        self,
        prompt: PromptHashes | Sequence[int] | np.ndarray,
        role: Role,
        *,
        request_id: str,
        exclude: Collection[str] = (),
    ) -> Route:
        """Choose an instance of `role` and count the request there; use it in a `with` statement.

        `exclude` names instances that this request must not go to again. Raises NoInstances.
        """
        if not isinstance(prompt, PromptHashes):
            prompt = self.hash(prompt)
        now_s = self._clock()
        candidates = self._candidates(role, exclude, now_s)
        size = PromptSize(prompt.num_tokens, candidates[0].info.model.block_size)
        load = {one.info.instance_id: one.load.estimate(now_s) for one in candidates}
        overlap = self._index.overlap(prompt.block_hashes)
        chosen = select(
            self.config.policy,
            role,
            size,
            overlap,
            load,
            rng=self._rng,
            turn=self._turns[role],
            overlap_weight=self.config.overlap_weight,
            temperature=self.config.temperature,
        )
        self._turns[role] += 1
        one, overlap_blocks = self._instances[chosen], overlap.get(chosen, 0)
        reservation = one.load.reserve(
            queued_tokens=0 if role == "decode" else size.uncached_tokens(overlap_blocks),
            blocks=size.missing_blocks(overlap_blocks),
        )
        return Route(request_id, role, one.info, size, overlap_blocks, reservation)

    def _candidates(self, role: Role, exclude: Collection[str], now_s: float) -> list[_Instance]:
        allowed = [
            one
            for instance_id, one in self._instances.items()
            if one.info.role == role and instance_id not in exclude
        ]
        if not allowed:
            tried = f" besides {', '.join(sorted(exclude))}" if exclude else ""
            raise NoInstances(f"no live instance for role {role}{tried}")
        return [one for one in allowed if one.unavailable_until_s <= now_s] or allowed

    def _of_epoch(self, instance_id: str, epoch: int) -> _Instance | None:
        known = self._instances.get(instance_id)
        if known is None or epoch > known.info.epoch:
            self.counters.unregistered += 1
            return None
        if epoch < known.info.epoch:
            self.counters.stale_epoch += 1
            return None
        return known

    def _forget(self, instance_id: str) -> None:
        del self._instances[instance_id]
        self._index.remove_instance(instance_id)
        if not self._instances:
            self._card = None

    def _misfit(self, info: InstanceInfo) -> str:
        """Why the instance does not fit; empty when it does."""
        required = self._required if self._card is None else _terms(self._card)
        return "; ".join(
            f"{what} is {theirs!r}, but {required[what]!r} is served here"
            for what, theirs in _terms(info.model).items()
            if required[what] not in (None, theirs)
        )


def _terms(card: ModelCard) -> dict[str, str | int | None]:
    """What must be equal for block hashes to mean the same."""
    return {"block size": card.block_size, "hash salt": card.hash_salt, "model": card.name}
