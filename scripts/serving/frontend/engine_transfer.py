"""Engines that move KV themselves: a decode follows every prefill, and all pairs are warmed up.

Such an engine frees the KV of a prefill only when a decode engine has fetched it. So a prefill runs
to its end even if its caller leaves, and its KV is always fetched: by a decode of one token if
nobody wants the answer any more.

The first request between two engines takes seconds, because it makes their connection. `warm_up`
sends that request before an instance is routed to.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import msgspec

from serving.errors import InstanceLost, ServingError
from serving.protocol import (
    EngineOutput,
    EngineRequest,
    EngineTransferParams,
    SamplingParams,
)
from serving.rpc import RpcClient

log = logging.getLogger(__name__)

FETCH_S = 60.0
WARM_UP_S = 60.0
_WARM_UP_TOKENS = list(range(1, 17))


class EngineTransfers:
    """Owns the work that outlives its requests. `decode_client` picks a live decode instance."""

    def __init__(self, decode_client: Callable[[], RpcClient]) -> None:
        self._decode_client = decode_client
        self._running: set[asyncio.Task[Any]] = set()

    async def prefill(
        self, request: EngineRequest, compute: Coroutine[Any, Any, EngineOutput]
    ) -> EngineOutput:
        """Await `compute`, which goes on if the caller is cancelled. Raises what it raises."""
        task = self._own(compute, f"prefill-{request.request_id}")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: self._on_abandoned(request, done))
            raise

    def abandon(self, request: EngineRequest, prefilled: EngineOutput) -> None:
        """Nobody wants the answer: let a decode instance fetch the KV and generate one token."""
        self._own(self._fetch(request, prefilled), f"fetch-{request.request_id}")

    async def close(self) -> None:
        """Stop. Prefill engines free the remaining KV after their own timeout."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _on_abandoned(self, request: EngineRequest, done: asyncio.Task[EngineOutput]) -> None:
        if not done.cancelled() and done.exception() is None:
            output = done.result()
            if output.kv_transfer_params is not None:
                self.abandon(request, output)

    async def _fetch(self, request: EngineRequest, prefilled: EngineOutput) -> None:
        token_ids = request.token_ids + prefilled.token_ids
        last = len(token_ids) - request.num_prompt_tokens + 1
        decode = msgspec.structs.replace(
            request,
            token_ids=token_ids,
            phase="decode",
            kv_transfer_params=prefilled.kv_transfer_params,
            sampling=msgspec.structs.replace(request.sampling, max_tokens=last, min_tokens=0),
            queue_s=None,
        )
        try:
            await last_output(self._decode_client(), decode, FETCH_S)
        except ServingError as exc:
            log.warning("%s: its KV stays with the prefill engine: %s", request.request_id, exc)

    def _own(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        # Not in a task group, where a failed request would end the frontend.
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


async def warm_up(client: RpcClient, peers: Iterable[RpcClient]) -> None:
    """Send one tiny request through each pair of `client` and one of `peers`, of the other role.

    A pair that fails is logged; its requests will fall back to local prefill. Raises InstanceLost
    when no pair works.
    """
    failures = []
    peers = list(peers)
    for peer in peers:
        source, target = (client, peer) if client.info.role == "prefill" else (peer, client)
        try:
            await _warm_up_pair(source, target)
        except ServingError as exc:
            pair = f"{source.info.instance_id} to {target.info.instance_id}"
            log.error("no KV from %s: %s", pair, exc)
            failures.append(f"{pair}: {exc}")
    if failures and len(failures) == len(peers):
        raise InstanceLost(client.info.instance_id, f"no KV moves, {'; '.join(failures)}")


_numbers = itertools.count()


async def _warm_up_pair(source: RpcClient, target: RpcClient) -> None:
    """Prefill on `source`, decode on `target`. Raises ServingError."""
    pair = f"{source.info.instance_id}-{target.info.instance_id}"
    prefill = EngineRequest(
        request_id=f"warm-up-{pair}-{target.info.epoch}-{next(_numbers)}",
        token_ids=_WARM_UP_TOKENS,
        num_prompt_tokens=len(_WARM_UP_TOKENS),
        sampling=SamplingParams(max_tokens=2, temperature=0.0),
        phase="prefill",
        deadline_s=WARM_UP_S,
    )
    first = await last_output(source, prefill, WARM_UP_S)
    if not isinstance(first.kv_transfer_params, EngineTransferParams):
        raise InstanceLost(source.info.instance_id, "a prefill ended without KV")
    decode = msgspec.structs.replace(
        prefill,
        token_ids=prefill.token_ids + first.token_ids,
        phase="decode",
        kv_transfer_params=first.kv_transfer_params,
    )
    await last_output(target, decode, WARM_UP_S)
    log.info("%s: warm", pair)


async def last_output(client: RpcClient, request: EngineRequest, within_s: float) -> EngineOutput:
    """The last output of a request, ignoring the others. Raises ServingError."""
    try:
        async with asyncio.timeout(within_s), client.generate(request) as outputs:
            async for output in outputs:
                if output.finish_reason is not None:
                    return output
    except TimeoutError:
        raise InstanceLost(client.info.instance_id, f"silent for {within_s:g} s") from None
    raise InstanceLost(client.info.instance_id)
