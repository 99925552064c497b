"""The path of a request: attempt it, and attempt it again elsewhere when an instance fails.

Read `attempt.py` for how one attempt prefills and decodes, and `stream.py` for how one instance's
outputs arrive. A request keeps the tokens that it has: when an instance is lost halfway, another
one gets the prompt with those tokens, and the answer continues where it stopped. A request that
fails the instances it goes to does not go to all of them (`quarantine.py`).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

import msgspec

from serving.config.process import FrontendSettings
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    NoInstances,
    Overloaded,
    QueuedTooLong,
    RequestQuarantined,
)
from serving.frontend.attempt import Attempts
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.quarantine import Quarantine
from serving.frontend.request import RequestState
from serving.frontend.stream import Outputs
from serving.kv_router.router import KvRouter
from serving.protocol import ModelCard, Phase
from serving.text.preprocess import PreparedRequest

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 16
"""A bound for what should not happen: each attempt leaves fewer instances for the next one."""


class Pipeline:
    """Everything behind the HTTP routes."""

    def __init__(
        self,
        settings: FrontendSettings,
        router: KvRouter,
        instances: Instances,
        metrics: Metrics,
    ) -> None:
        self._settings, self._router, self._instances = settings, router, instances
        self._metrics = metrics
        self._attempts = Attempts(router, instances, metrics)
        self._quarantine = Quarantine()
        self._roles: tuple[Phase, ...] = (
            ("prefill", "decode") if settings.disaggregated else ("agg",)
        )

    @property
    def card(self) -> ModelCard | None:
        """Of the served model; None until a worker has registered."""
        return self._instances.card

    async def close(self) -> None:
        """End the work that outlives its requests."""
        await self._attempts.close()

    async def generate(self, prepared: PreparedRequest) -> Outputs:
        """Outputs in order. Closing it aborts the request on every worker.

        The first output has `cached_tokens`, the last a `finish_reason`. Raises InvalidRequest,
        Overloaded (no instance takes it, or none begins it in time), InstanceLost or EngineFailed
        (and no other instance can continue), RequestQuarantined, DeadlineExceeded.
        """
        self._quarantine.require_innocent(prepared)
        now = asyncio.get_running_loop().time()
        request = RequestState(prepared, self._settings.deadlines, now)
        while True:
            try:
                async with aclosing(self._attempt(request)) as outputs:
                    async for output in outputs:
                        yield request.record(output)
                return
            except NoInstances:
                raise
            except DeadlineExceeded as exc:
                self._metrics.observe_deadline(exc.phase)
                raise
            except RequestQuarantined as exc:
                log.error("%s: %s", request.request_id, exc)
                self._quarantine.add(prepared)
                self._metrics.quarantined_requests.add()
                raise
            except (InstanceLost, Overloaded, EngineFailed) as exc:
                if isinstance(exc, QueuedTooLong):
                    self._metrics.observe_deadline("queue")
                    request.num_queue_timeouts += 1
                if not self._can_retry(request):
                    raise
                log.warning("%s continues elsewhere: %s", request.request_id, exc)
                request.attempt += 1

    def _attempt(self, request: RequestState) -> Outputs:
        """The rest of the answer, in the way that the live instances allow.

        While a disaggregated deployment lacks one role, the other role serves alone.
        """
        attempts, tried = self._attempts, request.tried
        if not self._settings.disaggregated:
            return attempts.aggregated(request, "agg")
        if not self._router.instances("decode", exclude=tried):
            return attempts.aggregated(request, "prefill")
        if not self._router.instances("prefill", exclude=tried):
            return attempts.aggregated(request, "decode")
        if request.prepared.pooling is not None:  # computed in one place, and no KV moves
            return attempts.aggregated(request, "prefill")
        return attempts.local_prefill(request) or attempts.disaggregated(request)

    def _can_retry(self, request: RequestState) -> bool:
        # After two queue timeouts, all instances are probably busy. Failing now is better than
        # waiting in every queue.
        if request.num_queue_timeouts > 1 or request.attempt >= MAX_ATTEMPTS:
            return False
        for role in self._roles:
            request.welcome(self._router.instances(role))
        return any(self._router.instances(role, exclude=request.tried) for role in self._roles)

    # --- for `/ready` ---------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether a request could be served now, by the same rule as `_attempt`, or the reason why
        not."""
        missing = self._missing_roles()
        if len(missing) == len(self._roles):
            return False, f"no {' and no '.join(missing)} worker is registered"
        return True, ""

    def _missing_roles(self) -> list[Phase]:
        return [role for role in self._roles if not self._router.instances(role)]

    def describe(self) -> dict[str, Any]:
        """Topology and instances; encodes as JSON."""
        return {
            "topology": self._settings.topology,
            "model": self._settings.model_name,
            "max_model_len": self.card and self.card.max_model_len,
            "dummy_weights": self.card is not None and self.card.dummy_weights,
            "text_only": self.card and msgspec.to_builtins(self.card.text_of),
            "policy": self._settings.router.policy,
            "missing_roles": self._missing_roles(),
            "instances": self._instances.describe(),
            "refused": dict(self._router.refused),
        }
