"""The whole request path, on one screen: route, prefill, hand over, decode, and try again.

A request keeps what it has generated. When an instance is lost in the middle, the prompt plus
those tokens go to another instance and the answer continues where it stopped. With one role of a
disaggregated deployment missing, the other one serves alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

import msgspec

from serving.config.process import FrontendSettings
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    NoInstances,
    Overloaded,
    QueuedTooLong,
)
from serving.frontend.early_decode import EarlyDecode
from serving.frontend.engine_transfer import EngineTransfers
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.request import RequestState
from serving.frontend.stream_deadline import StreamDeadline
from serving.kv_router.router import KvRouter, Route
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    EngineTransferParams,
    ModelCard,
    Phase,
    TransferParams,
)
from serving.rpc import RpcClient
from serving.text.preprocess import PreparedRequest

log = logging.getLogger(__name__)


class Pipeline:
    """Everything behind the HTTP routes."""

    def __init__(
        self,
        process: FrontendSettings,
        router: KvRouter,
        instances: Instances,
        metrics: Metrics,
    ) -> None:
        self._process, self._router, self._instances = process, router, instances
        self._metrics = metrics
        self._handovers = EngineTransfers(self._any_decode)
        self._deadlines = process.deadlines

    @property
    def card(self) -> ModelCard | None:
        return self._instances.card

    async def close(self) -> None:
        """End what goes on behind requests that have left."""
        await self._handovers.close()

    async def generate(self, prepared: PreparedRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs in order; the last has a finish_reason. Closing this aborts on every worker.

        Raises InvalidRequest, Overloaded (nothing can take it, or takes it up in time),
        InstanceLost (and nobody else could go on), DeadlineExceeded.
        """
        sequence = RequestState(prepared, self._deadlines, asyncio.get_running_loop().time())
        while True:
            try:
                async with aclosing(self._attempt(sequence)) as outputs:
                    async for output in outputs:
                        yield sequence.take(output)
                return
            except NoInstances:
                raise
            except DeadlineExceeded as exc:
                self._metrics.observe_deadline(exc.phase)
                raise
            except (InstanceLost, Overloaded) as exc:
                if isinstance(exc, QueuedTooLong):
                    self._metrics.observe_deadline("queue")
                    sequence.num_queues_left += 1
                if not self._can_retry(sequence):
                    raise
                log.warning("%s goes on elsewhere: %s", prepared.request_id, exc)
                sequence.attempt += 1

    def _attempt(self, sequence: RequestState) -> AsyncGenerator[EngineOutput, None]:
        if not self._process.disaggregated:
            return self._alone(sequence, "agg")
        if not self._router.instances("decode", exclude=sequence.tried):
            return self._alone(sequence, "prefill")
        if not self._router.instances("prefill", exclude=sequence.tried):
            return self._alone(sequence, "decode")
        return self._disaggregated(sequence)

    async def _alone(
        self, sequence: RequestState, role: Phase
    ) -> AsyncGenerator[EngineOutput, None]:
        """Prefill and decode on one instance."""
        with self._route(sequence, role) as route:
            async with aclosing(self._stream(sequence, route, "agg")) as outputs:
                async for output in outputs:
                    yield output

    async def _disaggregated(self, sequence: RequestState) -> AsyncGenerator[EngineOutput, None]:
        if local := self._route_local(sequence):
            with local as route:
                async with aclosing(self._stream(sequence, route, "agg")) as outputs:
                    async for output in outputs:
                        yield output
            return
        async with (
            EarlyDecode() as early,
            aclosing(self._handed_over(sequence, early)) as outputs,
        ):
            async for output in outputs:
                yield output

    async def _handed_over(
        self, sequence: RequestState, early: EarlyDecode
    ) -> AsyncGenerator[EngineOutput, None]:
        with self._route(sequence, "prefill") as source:
            prompt = sequence.request("prefill", self._deadlines.total_s)
            prompt = msgspec.structs.replace(prompt, token_ids=list(prompt.token_ids))
            compute = self._prefill(sequence, source, early)
            if self._instances.client(source.instance_id).info.kv_by_engine:
                first = await self._handovers.prefill(prompt, compute)
            else:
                first = await compute
        params = first.kv_transfer_params
        if params is None:  # the first token was also the last one
            yield first
            return
        fetched = False
        try:
            yield msgspec.structs.replace(first, finish_reason=None, kv_transfer_params=None)
            async with aclosing(self._decode(sequence, early, params)) as outputs:
                try:
                    async for output in outputs:
                        fetched = True
                        yield output
                except (asyncio.CancelledError, GeneratorExit, DeadlineExceeded):
                    # An engine that moves KV itself fetches it once asked, aborted or not.
                    fetched = fetched or isinstance(params, EngineTransferParams)
                    raise
        finally:
            if not fetched:  # the prefill instance still holds the blocks
                self._let_go(source.instance_id, prompt, first)

    async def _prefill(
        self, sequence: RequestState, source: Route, early: EarlyDecode
    ) -> EngineOutput:
        async with aclosing(self._stream(sequence, source, "prefill")) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    return output
                params, token_ids = output.kv_transfer_params, list(sequence.token_ids)
                early.start(self._follow(sequence, token_ids, params))
        raise AssertionError("a stream ends with a finish_reason or raises")

    async def _follow(
        self, sequence: RequestState, token_ids: list[int], params: TransferParams | None
    ) -> AsyncGenerator[EngineOutput, None]:
        """The decode of a prefill of `token_ids` that is going on."""
        more = {"kv_transfer_params": params, "follows_prefill": True}
        with self._route(sequence, "decode") as route:
            stream = self._stream(sequence, route, "decode", token_ids=token_ids, **more)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    yield output

    async def _decode(
        self, sequence: RequestState, early: EarlyDecode, params: TransferParams
    ) -> AsyncGenerator[EngineOutput, None]:
        if early.started:
            begun = False
            try:
                async with aclosing(early.outputs()) as outputs:
                    async for output in outputs:
                        begun = True
                        yield output
                return
            except (InstanceLost, Overloaded, EngineFailed) as exc:
                if begun or not self._router.instances("decode", exclude=sequence.tried):
                    raise
                log.info("%s is decoded after all: %s", sequence.prepared.request_id, exc)
        with self._route(sequence, "decode") as route:
            stream = self._stream(sequence, route, "decode", kv_transfer_params=params)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    yield output

    def _route(self, sequence: RequestState, role: Phase) -> Route:
        route = self._router.route(
            sequence.hashes(self._router),
            role,
            exclude=self._excluded(sequence, role),
            request_id=sequence.prepared.request_id,
            session=sequence.prepared.session,
        )
        return self._noted(sequence, route)

    def _route_local(self, sequence: RequestState) -> Route | None:
        """To a decode instance that had better prefill by itself, if there is one."""
        route = self._router.route_local(
            sequence.hashes(self._router),
            exclude=self._excluded(sequence, "decode"),
            request_id=sequence.prepared.request_id,
            session=sequence.prepared.session,
        )
        return route and self._noted(sequence, route)

    def _noted(self, sequence: RequestState, route: Route) -> Route:
        trace, sample_group = sequence.prepared.trace, sequence.prepared.sample_group
        if sample_group is not None:
            sample_group.instances[route.role] = route.instance_id
        trace.instances.append(route.instance_id)
        trace.overlap_blocks = max(trace.overlap_blocks, route.overlap_blocks)
        self._metrics.observe_routed(
            self._process.router.policy,
            route.role,
            route.instance_id,
            len(sequence.token_ids),
            route.overlap_tokens,
        )
        return route

    def _excluded(self, sequence: RequestState, role: Phase) -> set[str]:
        """Where it must not go: where it was tried, and where its sample_group are not."""
        sample_group = sequence.prepared.sample_group
        home = sample_group.instances.get(role) if sample_group is not None else None
        if home is None:
            return sequence.tried
        left = {one.instance_id for one in self._router.instances(role, exclude=sequence.tried)}
        return sequence.tried | (left - {home}) if home in left else sequence.tried

    async def _stream(
        self, sequence: RequestState, route: Route, phase: Phase, **more: Any
    ) -> AsyncGenerator[EngineOutput, None]:
        """One instance's outputs, each within its deadline."""
        instance_id, deadlines = route.instance_id, self._deadlines
        loop = asyncio.get_running_loop()
        waiting_for: Literal["prefill", "token"] = "prefill"

        def give_up() -> None:
            now = loop.time()
            if now >= sequence.deadline:
                outputs.fail(_exceeded("total", deadlines.total_s))
            elif waiting_for == "prefill" and now >= until:
                outputs.fail(_exceeded("prefill", deadlines.prefill_s))
            elif waiting_for == "prefill":
                outputs.fail(_exceeded("first token", deadlines.first_token_s))
            else:
                self._metrics.observe_deadline("token")
                outputs.fail(InstanceLost(instance_id, f"silent for {deadlines.token_s:g} s"))

        shortest_s = min(deadlines.prefill_s, deadlines.token_s)
        at_last = sequence.deadline
        if sequence.awaits_first_token(phase):
            at_last = min(at_last, sequence.first_token_deadline)
        try:
            request = sequence.request(phase, sequence.deadline - loop.time(), **more)
            stream = self._instances.client(instance_id).generate(request)
            async with stream as outputs:
                until = loop.time() + deadlines.prefill_s
                with StreamDeadline(shortest_s, at_last, give_up) as patience:
                    while True:
                        patience.until = min(until, patience.at_last)
                        output = await anext(outputs)
                        if output.kv_transfer_params is not None and output.finish_reason is None:
                            yield output  # the prefill goes on, and so does its deadline
                            continue
                        patience.until = None
                        if waiting_for == "prefill":
                            route.first_output()
                            waiting_for = "token"
                            patience.at_last = sequence.deadline
                        route.generated(len(output.token_ids))
                        yield output
                        if output.finish_reason is not None:
                            route.finished()
                            return
                        # From now: the caller may have taken its time meanwhile.
                        until = loop.time() + deadlines.token_s
        except Overloaded:  # busy is not broken
            sequence.tried.add(instance_id)
            raise
        except EngineFailed:
            self._router.answered_error(instance_id, route.instance.epoch)
            raise
        except (InstanceLost, DeadlineExceeded) as exc:
            sequence.tried.add(instance_id)
            # A long answer that runs into the end of its time says nothing against who gives it,
            # nor does a first token that is late for what happened elsewhere.
            if not (isinstance(exc, DeadlineExceeded) and exc.phase != "prefill"):
                self._router.failed(instance_id, route.instance.epoch)
            raise

    def _let_go(self, instance_id: str, request: EngineRequest, prefilled: EngineOutput) -> None:
        """Free what a prefill instance holds for a decode that does not come."""
        if isinstance(prefilled.kv_transfer_params, EngineTransferParams):
            self._handovers.abandon(request, prefilled)
            return
        try:
            self._instances.client(instance_id).release(request.request_id)
        except InstanceLost:
            return  # its blocks went with it

    def _any_decode(self) -> RpcClient:
        """The least loaded decode instance. Raises NoInstances, InstanceLost."""
        with self._router.route(self._router.hash([]), "decode", request_id="fetch") as route:
            return self._instances.client(route.instance_id)

    def _can_retry(self, sequence: RequestState) -> bool:
        # After a second queue everybody is busy, it seems: better told than made to wait in each.
        if sequence.num_queues_left > 1:
            return False
        roles: tuple[Phase, ...] = (
            ("prefill", "decode") if self._process.disaggregated else ("agg",)
        )
        return any(self._router.instances(role, exclude=sequence.tried) for role in roles)

    # --- for people ----------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether a request could be served now, or why not."""
        roles: tuple[Phase, ...] = (
            ("prefill", "decode") if self._process.disaggregated else ("agg",)
        )
        missing = [role for role in roles if not self._router.instances(role)]
        if missing:
            return False, f"no {' and no '.join(missing)} worker is registered"
        return True, ""

    def describe(self) -> dict[str, Any]:
        return {
            "topology": self._process.topology,
            "model": self._process.model_name,
            "dummy_weights": self.card is not None and self.card.dummy_weights,
            "policy": self._process.router.policy,
            "instances": self._instances.describe(),
            "refused": dict(self._router.refused),
        }


def _exceeded(phase: str, deadline_s: float) -> DeadlineExceeded:
    setting = f"deadlines.{phase.replace(' ', '_')}_s"
    return DeadlineExceeded(phase, deadline_s, setting=setting)
