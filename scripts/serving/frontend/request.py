"""A request while it is served: its tokens so far, its deadlines, its tried instances."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from serving.config import DeadlinesConfig
from serving.frontend.quarantine import Failures
from serving.kv_router.router import KvRouter, PromptHashes
from serving.protocol import EngineOutput, EngineRequest, InstanceInfo, Phase
from serving.text.preprocess import PreparedRequest


class RequestState:
    """One request in progress, over all of its attempts.

    `tried` holds the instances that it must not go to again, `failures` those that failed while
    they computed it. `deadline`, `first_token_deadline`
    and `now` are in the event loop's time.
    """

    def __init__(self, prepared: PreparedRequest, deadlines: DeadlinesConfig, now: float) -> None:
        self.prepared, self.deadlines = prepared, deadlines
        self.deadline = now + deadlines.total_s
        self.first_token_deadline = now + deadlines.first_token_s
        self.attempt = 1
        self.token_ids = list(prepared.token_ids)
        self.tried: set[str] = set()
        self._tried_epochs: dict[str, int] = {}
        self.failures = Failures()
        self.has_output = False
        self.num_queue_timeouts = 0
        self._hashes: PromptHashes | None = None

    @property
    def request_id(self) -> str:
        return self.prepared.request_id

    @property
    def attempt_id(self) -> str:
        """The id that instances see. Each attempt has its own, so that late outputs of an abandoned
        attempt are never taken for outputs of the next one."""
        return f"{self.request_id}~{self.attempt}" if self.attempt > 1 else self.request_id

    def hashes(self, router: KvRouter) -> PromptHashes:
        """Of all tokens so far. Computed once for each length, however often it is routed."""
        if self._hashes is None or self._hashes.num_tokens != len(self.token_ids):
            self._hashes = router.hash(self.token_ids)
        return self._hashes

    def record(self, output: EngineOutput) -> EngineOutput:
        """Keep the new tokens for a later attempt. Only the first output reports cached tokens."""
        self.token_ids += output.token_ids
        if self.has_output and output.cached_tokens is not None:
            output = msgspec.structs.replace(output, cached_tokens=None)
        self.has_output = True
        return output

    def avoid(self, instance: InstanceInfo) -> None:
        """Never go to this instance again; its successor of the same name is welcome."""
        self.tried.add(instance.instance_id)
        self._tried_epochs[instance.instance_id] = instance.epoch

    def welcome(self, instances: Iterable[InstanceInfo]) -> None:
        """Allow those that have been replaced since it was there."""
        for instance in instances:
            if self._tried_epochs.get(instance.instance_id, instance.epoch) < instance.epoch:
                self.tried.discard(instance.instance_id)

    def awaits_first_token(self, phase: Phase) -> bool:
        """Whether an instance that runs `phase` must produce the first token.

        A decode never does: its prefill has produced the token or is about to.
        """
        return not self.has_output and phase != "decode"

    def engine_request(self, phase: Phase, left_s: float, **transfer: Any) -> EngineRequest:
        """The message for an instance. `left_s` is the time until the request's deadline.

        `transfer` are further fields of the message; `token_ids` among them replaces all tokens.
        """
        return EngineRequest(
            request_id=self.attempt_id,
            token_ids=transfer.pop("token_ids", self.token_ids),
            num_prompt_tokens=len(self.prepared.token_ids) - self.prepared.num_generated,
            sampling=self.prepared.sampling,
            phase=phase,
            pooling=self.prepared.pooling,
            deadline_s=left_s,
            # An answer that has begun is finished, however long it queues.
            queue_s=self.deadlines.queue_s if self.awaits_first_token(phase) else None,
            **transfer,
        )
