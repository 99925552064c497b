"""The prefill endpoint: hands computed prompts over to decode workers.

The engine holds the blocks of a finished prefill; this module knows who may fetch them (a nonce
per request) and for how long. Every held request ends here exactly once: fetched, aborted, or
expired after `hold_s`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from serving.engine.base import BlockEngine
from serving.protocol import EngineOutput, EngineRequest, KvTransferParams

log = logging.getLogger(__name__)


class PrefillEndpoint:
    """Implements `kv_transfer.base.BlockSource` over an engine's held blocks."""

    def __init__(
        self,
        engine: BlockEngine,
        *,
        instance_id: str,
        epoch: int,
        hold_s: float,
        address: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._instance_id, self._epoch = instance_id, epoch
        self._hold_s, self._address = hold_s, address
        self._running: dict[str, EngineRequest] = {}
        self._held: dict[str, tuple[str, asyncio.TimerHandle]] = {}
        self.num_expired = 0

    @property
    def num_held(self) -> int:
        """Requests whose blocks wait for a decode worker."""
        return len(self._held)

    def submit(self, request: EngineRequest) -> None:
        """Raises what `Engine.submit` raises."""
        self._engine.submit(request)
        self._running[request.request_id] = request

    def finish(self, output: EngineOutput) -> EngineOutput:
        """Called with every output of the engine: adds the transfer params to a finished prefill."""
        if output.finish_reason is None:
            return output
        request = self._running.pop(output.request_id, None)
        if request is None:
            return output
        if output.finish_reason != "length" or not self._decode_follows(request):
            self._engine.kv.release(output.request_id)
            return output
        return msgspec.structs.replace(output, kv_transfer_params=self._hold(request))

    def _decode_follows(self, request: EngineRequest) -> bool:
        num_tokens = len(request.token_ids) + 1  # with the token just sampled
        generated = num_tokens - request.num_prompt_tokens
        return (
            generated < request.sampling.max_tokens and num_tokens < self._engine.spec.max_model_len
        )

    def _hold(self, request: EngineRequest) -> KvTransferParams:
        layout = self._engine.spec.kv_layout
        assert layout is not None, "a block engine has a layout"
        nonce = secrets.token_hex(16)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._hold_s, self._expire, request.request_id)
        self._held[request.request_id] = (nonce, timer)
        return KvTransferParams(
            source_instance=self._instance_id,
            source_epoch=self._epoch,
            address=self._address(),
            request_id=request.request_id,
            nonce=nonce,
            num_tokens=len(request.token_ids),
            num_blocks=self._engine.kv.exported(request.request_id),
            layout=layout.fingerprint,
        )

    def _expire(self, request_id: str) -> None:
        log.warning("%s: nobody fetched its KV within %g s; freed", request_id, self._hold_s)
        self.num_expired += 1
        self.done(request_id)

    def abort(self, request_id: str) -> None:
        """The caller is gone, before, during or after the prefill."""
        self._running.pop(request_id, None)
        self.done(request_id)

    # --- BlockSource ---------------------------------------------------------------------------

    def open(self, request_id: str, nonce: str) -> int:
        held = self._held.get(request_id)
        if held is None:
            raise KeyError(request_id)
        if not hmac.compare_digest(held[0].encode(), nonce.encode()):
            raise PermissionError("wrong nonce")
        return self._engine.kv.exported(request_id)

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._engine.kv.read(request_id, first, out)

    def done(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            held[1].cancel()
            self._engine.kv.release(request_id)
