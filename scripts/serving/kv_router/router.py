"""The KV router: which instance gets a request.

Joins the prefix index, the load of each instance and the policy. It is told everything (see
`membership.py`) and asks for nothing: no I/O, no tasks. All calls belong on one thread.
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
from serving.kv_router.policy import Choice, PromptSize, Select
from serving.kv_router.prefix_index import Overlap
from serving.kv_router.route import PromptHashes, Route, Sent
from serving.kv_router.sessions import Sessions
from serving.protocol import Role

__all__ = ["InstanceState", "KvRouter", "PromptHashes", "Route"]

Prompt = PromptHashes | Sequence[int] | np.ndarray


class _Question(NamedTuple):
    """A prompt that wants to go somewhere, and what is known about it now."""

    request_id: str
    session: str | None
    now_s: float
    block_hashes: list[int]
    size: PromptSize
    overlap: Overlap
    worth: Mapping[str, float]

    def left(self, one: Instance) -> int:
        """Tokens that the instance would have to compute."""
        return self.size.uncached_tokens(self.worth.get(one.instance_id, 0))


class KvRouter(Membership):
    """Instances, what they hold, how loaded they are; and the choice between them.

    `select` chooses in place of the configured policy.
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
        """Hash a prompt once, to be routed as often as needed."""
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

        `exclude` names instances that this request must not go to again. `session` names what the
        prompt belongs to, if anything. Raises NoInstances.
        """
        candidates = self._candidates(role, exclude)
        question = self._question(prompt, candidates[0], request_id, session)
        chosen = self._choose(question, role, candidates)
        return self._send(question, role, chosen, computes=role != "decode")

    def route_local(
        self,
        prompt: Prompt,
        *,
        request_id: str,
        exclude: Collection[str] = (),
        session: str | None = None,
    ) -> Route | None:
        """A decode instance that should compute the prompt itself, counted there; None when
        prefill and decode should be apart.

        That is one where nothing waits, and that lacks at most `local_prefill_tokens` of it; or
        (`local_prefill_when_idle`) that runs nothing and would be done before the best prefill
        instance.
        """
        if not self.uses_index:
            return None
        try:
            decodes = self._candidates("decode", exclude)
            prefills = self._candidates("prefill", exclude)
        except NoInstances:
            return None
        question = self._question(prompt, decodes[0], request_id, session)
        now_s, limit = question.now_s, self.config.local_prefill_tokens
        short = question.size.block_size if limit is None else limit
        soonest = min(
            one.load.estimate(now_s).queued_tokens + question.left(one) for one in prefills
        )
        idle_helps = self.config.local_prefill_when_idle
        suited = [
            one
            for one in decodes
            if not one.load.num_waiting
            and (
                (left := question.left(one)) <= short
                or (idle_helps and left < soonest and not one.load.estimate(now_s).num_requests)
            )
        ]
        if not suited:
            return None
        chosen = self._choose(question, "decode", suited)
        return self._send(question, "decode", chosen, computes=True)

    # --- one decision ---------------------------------------------------------------------------

    def _candidates(self, role: Role, exclude: Collection[str]) -> list[Instance]:
        allowed = [
            one
            for instance_id, one in self._instances.items()
            if one.info.role == role and instance_id not in exclude
        ]
        if not allowed:
            tried = f" besides {', '.join(sorted(exclude))}" if exclude else ""
            raise NoInstances(f"no live instance for role {role}{tried}")
        now_s = self._clock()
        return [one for one in allowed if one.breaker.admits(now_s)] or allowed

    def _question(
        self, prompt: Prompt, one: Instance, request_id: str, session: str | None
    ) -> _Question:
        if not isinstance(prompt, PromptHashes):
            prompt = self.hash(prompt)
        self._hear_others()
        overlap = self._index.overlap(prompt.block_hashes)
        return _Question(
            request_id,
            session,
            self._clock(),
            prompt.block_hashes,
            PromptSize(prompt.num_tokens, one.info.model.block_size),
            overlap,
            self._worth(overlap),
        )

    def _worth(self, overlap: Overlap) -> Mapping[str, float]:
        """Overlaps in blocks, where those in a host tier count for less."""
        if not overlap.on_host:
            return overlap.blocks
        discount = 1 - self.config.host_tier_weight
        return {
            instance_id: blocks - discount * overlap.on_host.get(instance_id, 0)
            for instance_id, blocks in overlap.blocks.items()
        }

    def _choose(self, question: _Question, role: Role, candidates: list[Instance]) -> str:
        now_s, worth, hashes = question.now_s, question.worth, question.block_hashes
        load = {one.instance_id: one.load.estimate(now_s) for one in candidates}
        if self.config.session_affinity:
            last = self._sessions.last(question.session, role)
            if last in load:
                if not self.uses_index:
                    return last
                share = self.config.session_affinity * question.size.num_blocks
                worth = {**worth, last: max(worth.get(last, 0), share)}
        held = max(question.overlap.blocks.values(), default=0)
        content = hashes[min(held, len(hashes) - 1)] if hashes else None
        turn = self._turns[role]
        self._turns[role] += 1
        return self._select(Choice(role, question.size, worth, load, turn, content, hashes))

    def _send(self, question: _Question, role: Role, chosen: str, *, computes: bool) -> Route:
        one, size = self._instances[chosen], question.size
        overlap_blocks = question.overlap.blocks.get(chosen, 0)
        queued_tokens = question.left(one) if computes else 0
        blocks = size.num_blocks - overlap_blocks
        if self.config.session_affinity:
            self._sessions.remember(question.session, role, chosen)
        if self.others is not None:
            self.others.tell(Sent(one.registration, question.now_s, queued_tokens, blocks))
        reservation = one.load.reserve(
            queued_tokens=queued_tokens, blocks=blocks, now_s=question.now_s
        )
        breaker = one.breaker
        tries = breaker.sent()
        return Route(
            question.request_id, role, one.info, size, overlap_blocks, reservation, breaker, tries
        )
