"""A request while it is served: what it has, how long it may take, and where it was tried."""

from __future__ import annotations

from typing import Any

import msgspec

from serving.config import DeadlinesConfig
from serving.kv_router.router import KvRouter, PromptHashes
from serving.protocol import EngineOutput, EngineRequest, Phase
from serving.text.preprocess import PreparedRequest


class RequestState:
    """A request in progress: its tokens so far, and what must not be said twice.

    `has_begun` with its first output. `now` and the deadlines are loop time.
    """

    def __init__(self, prepared: PreparedRequest, deadlines: DeadlinesConfig, now: float) -> None:
        self.prepared = prepared
        self.deadline = now + deadlines.total_s
        self.first_token_deadline = now + deadlines.first_token_s
        self.attempt = 1
        self.token_ids = list(prepared.token_ids)
        self.tried: set[str] = set()
        self.has_begun = False
        self.num_queues_left = 0  # by the deadline, without having been begun
        self._queue_s = deadlines.queue_s
        self._hashes: PromptHashes | None = None

    def hashes(self, router: KvRouter) -> PromptHashes:
        """Of all tokens so far; computed once however often they are routed."""
        if self._hashes is None or self._hashes.num_tokens != len(self.token_ids):
            self._hashes = router.hash(self.token_ids)
        return self._hashes

    def take(self, output: EngineOutput) -> EngineOutput:
        """Remember the tokens; report cached tokens with the first output only."""
        self.token_ids += output.token_ids
        if self.has_begun and output.cached_tokens is not None:
            output = msgspec.structs.replace(output, cached_tokens=None)
        self.has_begun = True
        return output

    def awaits_first_token(self, phase: Phase) -> bool:
        """Whether an instance asked for `phase` is to bring it. A decode is not: its prefill did,
        or does meanwhile."""
        return not self.has_begun and phase != "decode"

    def request(self, phase: Phase, left_s: float, **more: Any) -> EngineRequest:
        """Each attempt has an id of its own: what an instance still says about the one that was
        given up must not be taken for the next one's."""
        again = f"~{self.attempt}" if self.attempt > 1 else ""
        return EngineRequest(
            request_id=self.prepared.request_id + again,
            token_ids=more.pop("token_ids", self.token_ids),
            num_prompt_tokens=len(self.prepared.token_ids),
            sampling=self.prepared.sampling,
            phase=phase,
            deadline_s=left_s,
            # What was begun is finished, however long it takes to go on.
            queue_s=self._queue_s if self.awaits_first_token(phase) else None,
            **more,
        )
