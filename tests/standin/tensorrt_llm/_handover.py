"""Test code. Contexts that wait to be fetched, and the fetching of others'.

`opaque_state` says where the context's process listens, for which request, and the nonce that
opens it. A context ends when it was fetched or when its time is over, and by nothing else.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
from typing import Any

import msgspec
from serving.config import KvTransferConfig
from serving.engine.base import KvBlocks, KvReservation
from serving.errors import KvTransferFailed
from serving.kv_layout import KvLayout
from serving.kv_transfer import KvTransfer
from serving.protocol import KvTransferParams
from xxhash import xxh3_64_intdigest

from tensorrt_llm import _failures

_MAGIC = b"standin\x01"
_CHUNK_BYTES = 1 << 20
_DEADLINE_S = 30.0


class State(msgspec.Struct, frozen=True):
    """What `opaque_state` holds. `prompt` is a hash of the prompt's token ids."""

    address: str
    request_id: str
    nonce: str
    num_tokens: int
    num_blocks: int
    layout: str
    prompt: int


def prompt_hash(token_ids: list[int]) -> int:
    return xxh3_64_intdigest(msgspec.msgpack.encode(token_ids))


def unpack(opaque_state: Any) -> State:
    """Raises ValueError for bytes that no context made."""
    if not isinstance(opaque_state, bytes) or not opaque_state.startswith(_MAGIC):
        raise ValueError("opaque_state is not the bytes of a context")
    return msgspec.msgpack.decode(opaque_state.removeprefix(_MAGIC), type=State)


class Contexts:
    """Implements `kv_transfer.BlockSource`."""

    def __init__(self, blocks: KvBlocks, layout: KvLayout, transport: str) -> None:
        self._blocks, self._layout = blocks, layout
        config = KvTransferConfig(
            transport=os.environ.get("STANDIN_TRTLLM_TRANSPORT", transport),  # type: ignore[arg-type]
            chunk_bytes=_CHUNK_BYTES,
            connect_s=_DEADLINE_S,
            transfer_s=_DEADLINE_S,
        )
        host = os.environ.get("STANDIN_TRTLLM_HOST", "127.0.0.1")
        self._transfer = KvTransfer(config, layout, host=host)
        self._held: dict[str, tuple[str, asyncio.TimerHandle | None]] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    async def start(self) -> None:
        await self._transfer.serve(self)

    async def close(self) -> None:
        for key in list(self._held):
            self.done(key)
        await self._transfer.close()

    def hold(self, key: str, prompt: list[int], timeout_s: float | None) -> bytes:
        """Keep a finished context; returns its `opaque_state`."""
        nonce = secrets.token_hex(16)
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, self.done, key)
        self._held[key] = (nonce, timer)
        state = State(
            address=self._transfer.address,
            request_id=key,
            nonce=nonce,
            num_tokens=len(prompt),
            num_blocks=self._blocks.exported(key),
            layout=self._layout.fingerprint,
            prompt=prompt_hash(prompt),
        )
        return _MAGIC + msgspec.msgpack.encode(state)

    async def fetch(self, state: State, reservation: KvReservation) -> int:
        """Fill the reservation; returns bytes. Raises KvTransferFailed."""
        if _failures.wanted() == "fetch":
            raise KvTransferFailed(state.request_id, state.address, "told to fail")
        await asyncio.sleep(_failures.fetch_s())
        params = as_params(state)
        return await self._transfer.pull(
            params, reservation.first_block, reservation.num_blocks, reservation.write
        )

    # --- BlockSource ---------------------------------------------------------------------------

    def open(self, request_id: str, nonce: str) -> int:
        held = self._held.get(request_id)
        if held is None:
            raise KeyError(request_id)
        if not hmac.compare_digest(held[0].encode(), nonce.encode()):
            raise PermissionError("wrong nonce")
        return self._blocks.exported(request_id)

    def read(self, request_id: str, first: int, out: Any) -> None:
        self._blocks.read(request_id, first, out)

    def done(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            if held[1] is not None:
                held[1].cancel()
            self._blocks.release(request_id)


def as_params(state: State) -> KvTransferParams:
    return KvTransferParams(
        source_instance="context",
        source_epoch=0,
        address=state.address,
        request_id=state.request_id,
        nonce=state.nonce,
        num_tokens=state.num_tokens,
        num_blocks=state.num_blocks,
        layout=state.layout,
    )
