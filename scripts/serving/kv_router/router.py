"""The KV router: decides which instance gets a request.

`route` is the decision. It looks the prompt up in the prefix index, estimates the load of each
instance, and lets the policy choose. What the router knows of the instances arrives through its
base class (`membership.py`). No I/O, no tasks; all calls belong on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

import numpy as np

from serving.block_hash import chain
from serving.config import RouterConfig
from serving.errors import NoInstances
from serving.kv_router import policy
from serving.kv_router.membership import Instance, InstanceState, Membership
from serving.kv_router.peers import RoutingDecision
from serving.kv_router.policy import PromptSize, RoutingRequest, Select
from serving.kv_router.prefix_index import Overlap
from serving.kv_router.route import PromptHashes, Route
from serving.kv_router.sessions import Sessions
from serving.protocol import Role

__all__ = ["InstanceState", "KvRouter", "PromptHashes", "Route"]

Prompt = PromptHashes | Sequence[int] | np.ndarray


class _LocatedPrompt(NamedTuple):
    """A prompt, and how much of it each instance holds now.

    `value` is the overlap in blocks, where blocks in a host tier count for less.
    """

    request_id: str
    session: str | None
    now_s: float
    block_hashes: list[int]
    size: PromptSize
    overlap: Overlap
    value: Mapping[str, float]

    def uncached_tokens(self, instance: Instance) -> int:
        """Tokens that the instance would have to compute."""
        return self.size.uncached_tokens(self.value.get(instance.instance_id, 0))


class KvRouter(Membership):
    """Chooses between the instances of a `Membership`.

    `select` replaces the configured policy.
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
        select: Select | None = None,
    ) -> None:
        super().__init__(config, block_size, hash_salt, model=model, rng=rng, clock=clock)
        self._turns: dict[Role, int] = {"agg": 0, "prefill": 0, "decode": 0}
        self._sessions = Sessions()
        self._select = select or partial(policy.select, config=config, rng=rng or Random())

    def hash(self, token_ids: Sequence[int] | np.ndarray) -> PromptHashes:
        """Hash a prompt once; it can then be routed several times."""
        if self._card is None or not self.uses_index:
            return PromptHashes(len(token_ids), [])
        return PromptHashes(len(token_ids), chain(token_ids, self._card.block_size, self._root))

    def route(
        self,
        prompt: Prompt,
        role: Role,
        *,
        request_id: str,
        exclude: Collection[str] = (),
        session: str | None = None,
    ) -> Route:
        """Choose an instance of `role` and count the request there; use it in a `with` statement.

        `exclude` names instances that this request must not go to again. `session` names the
        conversation that the prompt belongs to, if any. Raises NoInstances.
        """
        candidates = self._candidates(role, exclude)
        located = self._locate(prompt, candidates[0], request_id, session)
        chosen = self._choose(located, role, candidates)
        return self._commit(located, role, chosen, computes=role != "decode")

    def route_local(
        self,
        prompt: Prompt,
        *,
        request_id: str,
        exclude: Collection[str] = (),
        session: str | None = None,
    ) -> Route | None:
        """Choose a decode instance that computes the prompt itself, and count the request there.
        None: prefill and decode should run on different instances.

        No request waits at such an instance, and at most `local_prefill_tokens` of the prompt are
        missing there. With `local_prefill_when_idle` an instance also qualifies when it runs
        nothing and would finish the prompt before the best prefill instance.
        """
        if not self.uses_index:
            return None
        try:
            decodes = self._candidates("decode", exclude)
            prefills = self._candidates("prefill", exclude)
        except NoInstances:
            return None
        located = self._locate(prompt, decodes[0], request_id, session)
        suited = self._suited_for_prefill(located, decodes, prefills)
        if not suited:
            return None
        chosen = self._choose(located, "decode", suited)
        return self._commit(located, "decode", chosen, computes=True)

    def _suited_for_prefill(
        self, located: _LocatedPrompt, decodes: list[Instance], prefills: list[Instance]
    ) -> list[Instance]:
        """The decode instances that should compute the prompt themselves; see `route_local`."""
        now_s, limit = located.now_s, self.config.local_prefill_tokens
        few_tokens = located.size.block_size if limit is None else limit
        tokens_before_done = min(
            prefill.load.estimate(now_s).queued_tokens + located.uncached_tokens(prefill)
            for prefill in prefills
        )
        suited = []
        for decode in decodes:
            if decode.load.num_waiting:
                continue
            uncached = located.uncached_tokens(decode)
            if uncached <= few_tokens or (
                self.config.local_prefill_when_idle
                and uncached < tokens_before_done
                and not decode.load.estimate(now_s).num_requests
            ):
                suited.append(decode)
        return suited

    # --- one decision ---------------------------------------------------------------------------

    def _candidates(self, role: Role, exclude: Collection[str]) -> list[Instance]:
        allowed = [
            instance
            for instance_id, instance in self._instances.items()
            if instance.info.role == role and instance_id not in exclude
        ]
        if not allowed:
            tried = f" besides {', '.join(sorted(exclude))}" if exclude else ""
            raise NoInstances(f"no live instance for role {role}{tried}")
        now_s = self._clock()
        return [instance for instance in allowed if instance.breaker.admits(now_s)] or allowed

    def _locate(
        self, prompt: Prompt, instance: Instance, request_id: str, session: str | None
    ) -> _LocatedPrompt:
        if not isinstance(prompt, PromptHashes):
            prompt = self.hash(prompt)
        self._read_peer_decisions()
        overlap = self._index.overlap(prompt.block_hashes)
        return _LocatedPrompt(
            request_id,
            session,
            self._clock(),
            prompt.block_hashes,
            PromptSize(prompt.num_tokens, instance.info.model.block_size),
            overlap,
            self._value(overlap),
        )

    def _value(self, overlap: Overlap) -> Mapping[str, float]:
        """Overlaps in blocks, where those in a host tier count for less."""
        if not overlap.on_host:
            return overlap.blocks
        discount = 1 - self.config.host_tier_weight
        return {
            instance_id: blocks - discount * overlap.on_host.get(instance_id, 0)
            for instance_id, blocks in overlap.blocks.items()
        }

    def _choose(self, located: _LocatedPrompt, role: Role, candidates: list[Instance]) -> str:
        now_s, value = located.now_s, located.value
        load = {instance.instance_id: instance.load.estimate(now_s) for instance in candidates}
        if self.config.session_affinity:
            last = self._sessions.last(located.session, role)
            if last in load:
                if not self.uses_index:
                    return last
                share = self.config.session_affinity * located.size.num_blocks
                value = {**value, last: max(value.get(last, 0), share)}
        turn = self._turns[role]
        self._turns[role] += 1
        num_known = max(located.overlap.blocks.values(), default=0)
        return self._select(
            RoutingRequest(role, located.size, value, load, turn, located.block_hashes, num_known)
        )

    def _commit(self, located: _LocatedPrompt, role: Role, chosen: str, *, computes: bool) -> Route:
        """Count the request at the chosen instance, and show the decision to peer routers."""
        instance, size, now_s = self._instances[chosen], located.size, located.now_s
        overlap_blocks = located.overlap.blocks.get(chosen, 0)
        queued_tokens = located.uncached_tokens(instance) if computes else 0
        blocks = size.num_blocks - overlap_blocks
        if self.config.session_affinity:
            self._sessions.remember(located.session, role, chosen)
        if self.peers is not None:
            self.peers.publish(RoutingDecision(instance.registration, now_s, queued_tokens, blocks))
        reservation = instance.load.reserve(queued_tokens=queued_tokens, blocks=blocks, now_s=now_s)
        return Route(
            located.request_id,
            role,
            instance.info,
            size,
            overlap_blocks,
            reservation,
            instance.breaker,
            is_probe=instance.breaker.request_sent(),
        )
