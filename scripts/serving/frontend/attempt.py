"""One attempt at a request: route it, then compute it on one instance or on two.

On two instances, the first prefills and produces the first token. The second fetches the prompt's
KV and decodes. An attempt does not try again: that is the pipeline's.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import msgspec

from serving.errors import DeadlineExceeded, EngineFailed, InstanceLost, Overloaded
from serving.frontend.early_decode import EarlyDecode
from serving.frontend.engine_transfer import EngineTransfers
from serving.frontend.instances import Instances
from serving.frontend.metrics.registry import Metrics
from serving.frontend.request import RequestState
from serving.frontend.stream import InstanceStreams, Outputs
from serving.kv_router.router import KvRouter, Route
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    EngineTransferParams,
    Phase,
    TransferParams,
)
from serving.rpc import RpcClient

log = logging.getLogger(__name__)


class Prefilled(NamedTuple):
    """The end of a prefill of `num_tokens`. The instance holds their KV if they must be decoded."""

    instance_id: str
    num_tokens: int
    output: EngineOutput


class Attempts:
    """The ways to serve a request. Each returns the outputs, to be iterated at once and closed."""

    def __init__(self, router: KvRouter, instances: Instances, metrics: Metrics) -> None:
        self._router, self._instances, self._metrics = router, instances, metrics
        self._streams = InstanceStreams(router, instances, metrics)
        self._engine_transfers = EngineTransfers(self._any_decode_client)

    async def close(self) -> None:
        """End the work that outlives its requests."""
        await self._engine_transfers.close()

    # --- the ways ------------------------------------------------------------------------------

    def aggregated(self, request: RequestState, role: Phase) -> Outputs:
        """Prefill and decode on one instance of `role`. Raises NoInstances."""
        return self._streams.outputs(request, self._route(request, role), "agg")

    def local_prefill(self, request: RequestState) -> Outputs | None:
        """Both on a decode instance; None unless the router finds that worthwhile."""
        route = self._router.route_local(
            request.hashes(self._router),
            exclude=self._excluded(request, "decode"),
            request_id=request.request_id,
            session=request.prepared.session,
        )
        if route is None:
            return None
        self._record(request, route)
        return self._streams.outputs(request, route, "agg")

    async def disaggregated(self, request: RequestState) -> Outputs:
        """Prefill on one instance, decode on another."""
        async with aclosing(EarlyDecode()) as early:
            prefilled = await self._prefill(request, early)
            params = prefilled.output.kv_transfer_params
            if params is None:  # The first token was also the last one.
                yield prefilled.output
                return
            is_fetched = False
            try:
                yield msgspec.structs.replace(
                    prefilled.output, finish_reason=None, kv_transfer_params=None
                )
                try:
                    decode = await self._decode(request, early, params)
                    async with aclosing(decode) as outputs:
                        async for output in outputs:
                            is_fetched = True
                            yield output
                except (asyncio.CancelledError, GeneratorExit, DeadlineExceeded):
                    # An engine that moves KV itself fetches it once asked, aborted or not.
                    is_fetched = is_fetched or isinstance(params, EngineTransferParams)
                    raise
            finally:
                if not is_fetched:
                    self._release(request, prefilled)

    # --- prefill, decode, hand-over ------------------------------------------------------------

    async def _prefill(self, request: RequestState, early: EarlyDecode) -> Prefilled:
        num_tokens = len(request.token_ids)
        route = self._route(request, "prefill")
        compute = self._run_prefill(request, route, early)
        if route.instance.kv_by_engine:
            message = _prefill_message(request, num_tokens)
            output = await self._engine_transfers.prefill(message, compute)
        else:
            output = await compute
        return Prefilled(route.instance_id, num_tokens, output)

    async def _run_prefill(
        self, request: RequestState, route: Route, early: EarlyDecode
    ) -> EngineOutput:
        """The last output. Starts the early decode once the instance offers the first blocks."""
        async with aclosing(self._streams.outputs(request, route, "prefill")) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    return output
                token_ids, params = list(request.token_ids), output.kv_transfer_params
                early.start(partial(self._early_decode, request, token_ids, params))
        raise AssertionError("a stream ends with a finish_reason or raises")

    def _early_decode(
        self, request: RequestState, token_ids: list[int], params: TransferParams | None
    ) -> Outputs:
        return self._streams.outputs(
            request,
            self._route(request, "decode"),
            "decode",
            token_ids=token_ids,
            kv_transfer_params=params,
            follows_prefill=True,
        )

    async def _decode(
        self, request: RequestState, early: EarlyDecode, params: TransferParams
    ) -> EarlyDecode | Outputs:
        """The early decode if it works, else a new one. Raises what neither can recover from."""
        if early.is_started:
            try:
                await early.wait_for_first()
                return early
            except (InstanceLost, Overloaded, EngineFailed) as exc:
                if not self._router.instances("decode", exclude=request.tried):
                    raise
                log.info("%s: early decode failed, starting another: %s", request.request_id, exc)
        route = self._route(request, "decode")
        return self._streams.outputs(request, route, "decode", kv_transfer_params=params)

    def _release(self, request: RequestState, prefilled: Prefilled) -> None:
        """Free the KV that a prefill instance holds for a decode that will not come."""
        if isinstance(prefilled.output.kv_transfer_params, EngineTransferParams):
            message = _prefill_message(request, prefilled.num_tokens)
            self._engine_transfers.abandon(message, prefilled.output)
            return
        try:
            self._instances.client(prefilled.instance_id).release(request.attempt_id)
        except InstanceLost:
            return  # Its blocks are lost with it.

    # --- routing -------------------------------------------------------------------------------

    def _route(self, request: RequestState, role: Phase) -> Route:
        """Raises NoInstances."""
        route = self._router.route(
            request.hashes(self._router),
            role,
            exclude=self._excluded(request, role),
            request_id=request.request_id,
            session=request.prepared.session,
        )
        self._record(request, route)
        return route

    def _excluded(self, request: RequestState, role: Phase) -> set[str]:
        """Instances that it must not go to.

        Samples of one prompt share an instance as long as it is there, to share its blocks.
        """
        group = request.prepared.sample_group
        home = group.instances.get(role) if group is not None else None
        if home is None:
            return request.tried
        allowed = {
            instance.instance_id for instance in self._router.instances(role, exclude=request.tried)
        }
        return request.tried | (allowed - {home}) if home in allowed else request.tried

    def _record(self, request: RequestState, route: Route) -> None:
        """Note the decision for the request's other samples, its log line and the metrics."""
        group, trace = request.prepared.sample_group, request.prepared.trace
        if group is not None:
            group.instances[route.role] = route.instance_id
        trace.instances.append(route.instance_id)
        trace.overlap_blocks = max(trace.overlap_blocks, route.overlap_blocks)
        self._metrics.observe_routed(
            self._router.config.policy,
            route.role,
            route.instance_id,
            len(request.token_ids),
            route.overlap_tokens,
        )

    def _any_decode_client(self) -> RpcClient:
        """Of the least loaded decode instance. Raises NoInstances, InstanceLost."""
        with self._router.route(self._router.hash([]), "decode", request_id="fetch") as route:
            return self._instances.client(route.instance_id)


def _prefill_message(request: RequestState, num_tokens: int) -> EngineRequest:
    """The request as the prefill instance got it: the tokens that came before its output."""
    token_ids = request.token_ids[:num_tokens]
    return request.engine_request("prefill", request.deadlines.total_s, token_ids=token_ids)
