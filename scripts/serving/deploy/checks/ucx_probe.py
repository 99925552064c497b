"""One end of a UCX trial between two processes, with the transfer code that workers use.

`python -m serving.deploy.checks.ucx_probe serve` holds blocks of known contents, prints its address
and waits until its input closes. `... pull ADDRESS` fetches them and prints the outcome as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from serving.config import KvTransferConfig
from serving.errors import OperatorError, ServingError
from serving.kv_layout import KvLayout
from serving.kv_transfer import KvTransfer, PrefillProgress
from serving.protocol import KvTransferParams

LAYOUT = KvLayout.uniform(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32")
NUM_BLOCKS = 64
CHUNK_BYTES = 1024 * 1024
DEADLINE_S = 20.0
REQUEST_ID, NONCE = "ucx-probe", "ucx-probe-nonce"


def contents() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Both ends make the same bytes, `[NUM_BLOCKS, block_bytes]`."""
    shape = (NUM_BLOCKS, LAYOUT.block_bytes)
    return np.random.default_rng(20).integers(0, 256, shape, dtype=np.uint8)


class KnownBlocks:
    """A BlockSource with the known contents."""

    def __init__(self) -> None:
        self._blocks = contents()

    def open(self, request_id: str, nonce: str) -> int:
        if (request_id, nonce) != (REQUEST_ID, NONCE):
            raise PermissionError(request_id)
        return NUM_BLOCKS

    async def progress(self, request_id: str, nonce: str, beyond: int) -> PrefillProgress:
        return PrefillProgress(self.open(request_id, nonce), 0)

    def read(self, request_id: str, first: int, out: Any) -> None:
        target = np.frombuffer(out, dtype=np.uint8)
        count = target.size // LAYOUT.block_bytes
        target[:] = self._blocks[first : first + count].reshape(-1)

    memory = None

    def lend(self, request_id: str, first: int, count: int) -> AbstractContextManager[list[int]]:
        raise KeyError(request_id)

    def done(self, request_id: str) -> None:
        """Nothing to free: the process ends with its input."""


def _transfer() -> KvTransfer:
    config = KvTransferConfig(
        transport="ucx", chunk_bytes=CHUNK_BYTES, connect_s=DEADLINE_S, transfer_s=DEADLINE_S
    )
    return KvTransfer(config, LAYOUT, host="127.0.0.1")


async def serve() -> None:
    transfer = _transfer()
    try:
        await transfer.serve(KnownBlocks())
        print(transfer.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await transfer.close()


async def pull(address: str) -> None:
    expected, got = contents(), np.zeros((NUM_BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)

    def sink(first: int, data: Any) -> None:
        piece = np.frombuffer(data, dtype=np.uint8).reshape(-1, LAYOUT.block_bytes)
        got[first : first + len(piece)] = piece

    params = KvTransferParams(
        source_instance="probe",
        source_epoch=1,
        address=address,
        request_id=REQUEST_ID,
        nonce=NONCE,
        num_tokens=NUM_BLOCKS * LAYOUT.block_size,
        num_blocks=NUM_BLOCKS,
        layout=LAYOUT.fingerprint,
    )
    transfer = _transfer()
    try:
        await transfer.pull(params, 0, 1, sink)  # connects, which takes longer than the rest
        started = time.monotonic()
        num_bytes = await transfer.pull(params, 0, NUM_BLOCKS, sink)
        seconds = time.monotonic() - started
    finally:
        await transfer.close()
    found = {"bytes": num_bytes, "seconds": seconds, "equal": bool(np.array_equal(got, expected))}
    print(json.dumps(found), flush=True)


def main(arguments: list[str]) -> None:
    ends: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"serve": serve, "pull": pull}
    try:
        asyncio.run(ends[arguments[0]](*arguments[1:]))
    except OperatorError as exc:
        sys.exit(exc.what)
    except ServingError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main(sys.argv[1:])
