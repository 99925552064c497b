"""One instance's outputs for a request, each within its deadline.

A stream also keeps the router informed: what the route's load is now, and whether a failure counts
against the instance. It does not choose instances and does not try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    KvNotFetched,
    Overloaded,
    RequestQuarantined,
    ServingError,
)
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.request import RequestState
from serving.frontend.stream_deadline import StreamDeadline
from serving.kv_router.router import KvRouter, Route
from serving.protocol import EngineOutput, Phase

Outputs = AsyncGenerator[EngineOutput, None]


class InstanceStreams:
    """Opens streams to the instances that the router chose."""

    def __init__(self, router: KvRouter, instances: Instances, metrics: Metrics) -> None:
        self._router, self._instances, self._metrics = router, instances, metrics

    async def outputs(
        self, request: RequestState, route: Route, phase: Phase, **transfer: Any
    ) -> Outputs:
        """Outputs of the routed instance; the last has a finish_reason. Closing it aborts there.

        Iterate at once: the stream owns `route`, and its load counts until the stream ends.
        `transfer` are further fields of the EngineRequest. Raises InstanceLost, Overloaded,
        EngineFailed, DeadlineExceeded; RequestQuarantined when it has failed its last instance.
        """
        loop, deadlines = asyncio.get_running_loop(), request.deadlines
        has_output = is_sent = False
        end = request.deadline
        if request.awaits_first_token(phase):
            end = min(end, request.first_token_deadline)

        def expire() -> None:
            is_prefill_late = not has_output and loop.time() >= due
            stream.fail(self._expired(request, route, has_output, is_prefill_late))

        with route:
            try:
                message = request.engine_request(phase, request.deadline - loop.time(), **transfer)
                async with self._instances.client(route.instance_id).generate(message) as stream:
                    is_sent = True
                    due = loop.time() + deadlines.prefill_s
                    shortest_s = min(deadlines.prefill_s, deadlines.token_s)
                    with StreamDeadline(shortest_s, end, expire, loop) as deadline:
                        while True:
                            deadline.due = min(due, deadline.end)
                            output = await anext(stream)
                            if (
                                output.kv_transfer_params is not None
                                and output.finish_reason is None
                            ):
                                yield output  # The prefill goes on, and so does its deadline.
                                continue
                            deadline.due = None
                            if not has_output:
                                has_output = True
                                route.first_output()
                                deadline.end = request.deadline
                            route.generated(len(output.token_ids))
                            yield output
                            if output.finish_reason is not None:
                                route.finished()
                                return
                            # Counts from now, because the caller may have paused.
                            due = loop.time() + deadlines.token_s
            except (InstanceLost, Overloaded, EngineFailed, DeadlineExceeded) as exc:
                self._record_failure(request, route, exc)
                if is_sent and _is_suspicious(exc):
                    request.failures.add(had_output=has_output)
                    if request.failures.is_cause:
                        raise RequestQuarantined(
                            f"{request.failures.count} workers failed while they computed this "
                            f"request, and it is not tried again; the last one: {exc}"
                        ) from exc
                raise

    def _expired(
        self, request: RequestState, route: Route, has_output: bool, is_prefill_late: bool
    ) -> ServingError:
        """The error for the deadline that has passed."""
        deadlines = request.deadlines
        if asyncio.get_running_loop().time() >= request.deadline:
            return _exceeded("total", deadlines.total_s)
        if has_output:
            self._metrics.observe_deadline("token")
            return InstanceLost(route.instance_id, f"silent for {deadlines.token_s:g} s")
        if is_prefill_late:
            return _exceeded("prefill", deadlines.prefill_s)
        return _exceeded("first token", deadlines.first_token_s)

    def _record_failure(self, request: RequestState, route: Route, exc: ServingError) -> None:
        """Keep the request away from the instance, and other requests if it is broken."""
        instance_id, epoch = route.instance_id, route.instance.epoch
        if not isinstance(exc, KvNotFetched):
            request.avoid(route.instance)
        if isinstance(exc, EngineFailed):
            self._router.answered_error(instance_id, epoch)
            return
        # A busy instance is not broken. Nor is one whose answer reaches the request's total
        # deadline, or whose first token is late because of time spent elsewhere.
        is_broken = isinstance(exc, InstanceLost) or (
            isinstance(exc, DeadlineExceeded) and exc.phase == "prefill"
        )
        if is_broken:
            self._router.failed(instance_id, epoch)


def _is_suspicious(exc: ServingError) -> bool:
    """Whether the request itself may be why the instance failed."""
    return isinstance(exc, InstanceLost | EngineFailed) and not isinstance(exc, KvNotFetched)


def _exceeded(phase: str, deadline_s: float) -> DeadlineExceeded:
    setting = f"deadlines.{phase.replace(' ', '_')}_s"
    return DeadlineExceeded(phase, deadline_s, setting=setting)
