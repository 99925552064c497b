"""The prefill endpoint: hands computed prompts over to decode workers.

The engine holds the blocks of a finished prefill. This module knows who may fetch them (a nonce
per request) and for how long. A prompt of several chunks is offered after its first chunk, so that
its blocks travel while the rest is computed. Every offer ends exactly once: its blocks are fetched,
its request is aborted, its prefill ends without KV, or it expires `hold_s` after the prefill.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serving.engine.base import BlockEngine
from serving.kv_layout import PoolMemory
from serving.kv_transfer import PrefillProgress
from serving.protocol import EngineOutput, EngineRequest, KvTransferParams

log = logging.getLogger(__name__)


@dataclass
class Offer:
    """A prompt whose KV may be fetched. `token` is the first one after it, once that is known."""

    params: KvTransferParams
    token: int | None = None
    expiry: asyncio.TimerHandle | None = None
    progressed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wake the decode workers that wait for progress of the prefill."""
        self.progressed.set()
        self.progressed = asyncio.Event()


class PrefillEndpoint:
    """Implements `kv_transfer.BlockSource` over an engine's blocks."""

    def __init__(
        self,
        engine: BlockEngine,
        *,
        instance_id: str,
        epoch: int,
        hold_s: float,
        overlap: bool,
        address: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._instance_id, self._epoch = instance_id, epoch
        self._hold_s, self._overlap, self._address = hold_s, overlap, address
        self._running: dict[str, EngineRequest] = {}
        self._offers: dict[str, Offer] = {}
        self.num_expired = 0

    @property
    def num_held(self) -> int:
        """Requests whose blocks wait for a decode worker, or are on their way to it."""
        return len(self._offers)

    def submit(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""
        self._engine.submit(request)
        self._running[request.request_id] = request

    def on_output(self, output: EngineOutput) -> EngineOutput | None:
        """Sees every output of the engine, and adds the transfer params when a prefill has
        finished or computed its first chunk. None: the frontend needs no output."""
        request = self._running.get(output.request_id)
        if request is None:
            return output
        if output.finish_reason is None:
            return output if output.token_ids else self._on_progress(request)
        del self._running[output.request_id]
        if output.finish_reason != "length" or not self._decode_follows(request):
            self._withdraw(output.request_id)
            self._engine.kv.release(output.request_id)
            return output
        offer = self._offers.get(output.request_id) or self._offer(request)
        [offer.token] = output.token_ids
        loop = asyncio.get_running_loop()
        offer.expiry = loop.call_later(self._hold_s, self._expire, request.request_id)
        offer.notify()
        return msgspec.structs.replace(output, kv_transfer_params=offer.params)

    def _on_progress(self, request: EngineRequest) -> EngineOutput | None:
        if offer := self._offers.get(request.request_id):
            offer.notify()
            return None
        # A guide needs the first token, which a decode that starts now does not have.
        is_guided = request.sampling.guide is not None
        if not self._overlap or is_guided or not self._decode_follows(request):
            return None
        offer = self._offer(request)
        return EngineOutput(request.request_id, [], kv_transfer_params=offer.params)

    def _decode_follows(self, request: EngineRequest) -> bool:
        num_tokens = len(request.token_ids) + 1  # with the token just sampled
        generated = num_tokens - request.num_prompt_tokens
        return (
            generated < request.sampling.max_tokens and num_tokens < self._engine.spec.max_model_len
        )

    def _offer(self, request: EngineRequest) -> Offer:
        layout = self._engine.spec.kv_layout
        assert layout is not None, "a block engine has a layout"
        offer = self._offers[request.request_id] = Offer(
            KvTransferParams(
                source_instance=self._instance_id,
                source_epoch=self._epoch,
                address=self._address(),
                request_id=request.request_id,
                nonce=secrets.token_hex(16),
                num_tokens=len(request.token_ids),
                num_blocks=layout.num_blocks(len(request.token_ids)),
                layout=layout.fingerprint,
            )
        )
        return offer

    def _expire(self, request_id: str) -> None:
        log.warning("%s: its KV was not fetched within %g s and is freed", request_id, self._hold_s)
        self.num_expired += 1
        self.done(request_id)

    def abort(self, request_id: str) -> None:
        """The caller has gone, before, during or after the prefill."""
        self._running.pop(request_id, None)
        self.done(request_id)

    def _withdraw(self, request_id: str) -> bool:
        offer = self._offers.pop(request_id, None)
        if offer is None:
            return False
        if offer.expiry is not None:
            offer.expiry.cancel()
        offer.notify()
        return True

    # --- BlockSource ---------------------------------------------------------------------------

    def open(self, request_id: str, nonce: str) -> int:
        return self._authorised(request_id, nonce).params.num_blocks

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        while True:
            offer = self._authorised(request_id, nonce)
            if offer.token is not None:
                return PrefillProgress(offer.params.num_blocks, offer.token)
            if (computed := self._engine.kv.computed(request_id)) > beyond:
                return PrefillProgress(computed)
            await offer.progressed.wait()

    def _authorised(self, request_id: str, nonce: str) -> Offer:
        offer = self._offers.get(request_id)
        if offer is None:
            raise KeyError(request_id)
        if not hmac.compare_digest(offer.params.nonce.encode(), nonce.encode()):
            raise PermissionError("wrong nonce")
        return offer

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._engine.kv.read(request_id, first, out)

    @property
    def memory(self) -> PoolMemory | None:
        return self._engine.kv.memory

    def lend(self, request_id: str, first: int, count: int) -> AbstractContextManager[list[int]]:
        return self._engine.kv.lend(request_id, first, count)

    def done(self, request_id: str) -> None:
        if self._withdraw(request_id):
            self._engine.kv.release(request_id)
