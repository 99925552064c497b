"""The memory of the host tier, and the copies between it and the device's blocks.

On CUDA the memory is pinned and all copies go, without waiting, to the stream that the calling
thread computes on: each follows the steps launched before it and precedes those launched after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from serving.engine.core.host_tier import Copies
from serving.engine.core.sequence import Sequence, State
from serving.engine.core.step import Chunk
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.runner import ModelRunner
from serving.errors import OperatorError
from serving.host_memory import host_memory
from serving.protocol import EngineRequest, SamplingParams

log = logging.getLogger(__name__)

_COPY_TRIES = 5
_COMPUTE_TRIES = 2


def open_host_blocks(
    runner: ModelRunner, host_cache_bytes: int, num_tokens: int
) -> HostBlocks | None:
    """The memory of a host tier; None where computing a block is cheaper than copying it.

    Both are measured: a block's copy, and its share of a prefill of `num_tokens`.
    """
    layout = runner.layout
    host = HostBlocks(runner.pool, host_cache_bytes)
    copy_s = host.onload_s()
    compute_s = _prefill_s(runner, num_tokens) * layout.block_size / num_tokens
    log.info(
        "host tier of %d blocks (%.0f MiB): a block is copied in %.3f ms, computed in %.3f ms",
        host.num_blocks,
        host.num_blocks * layout.block_bytes / 2**20,
        1e3 * copy_s,
        1e3 * compute_s,
    )
    if copy_s < compute_s:
        return host
    log.warning("no host tier: computing is cheaper than copying on this device")
    host.close()
    return None


class HostBlocks:
    """`num_blocks` blocks of the pool's layout in host memory."""

    def __init__(self, pool: KvPool, host_cache_bytes: int) -> None:
        """Raises OperatorError when that is too little for one block, or more than there is."""
        block_bytes = pool.layout.block_bytes
        self.num_blocks = host_cache_bytes // block_bytes
        if not self.num_blocks:
            raise OperatorError(
                f"`engine.host_cache_bytes` {host_cache_bytes} is too little for one block",
                remedy=f"set it to {block_bytes} or more, or to 0 for no host tier",
            )
        available = host_memory().available
        if host_cache_bytes > available:
            raise OperatorError(
                f"`engine.host_cache_bytes` {host_cache_bytes} is more than the "
                f"{available} bytes of memory that are available",
                remedy="set it to less; every worker takes as much",
            )
        self._device = pool.tensor.flatten(1).view(torch.uint8)
        self._host = torch.empty((self.num_blocks, block_bytes), dtype=torch.uint8)
        self._is_pinned = self._device.is_cuda
        if self._is_pinned:
            # Registered: torch's own pinned memory comes in powers of two.
            _check(_cudart().cudaHostRegister(self._host.data_ptr(), self._host.nbytes, 0))

    def run(self, copies: Copies) -> Callable[[], None]:
        """Start the copies of one step, in order. The returned function waits until they are made."""
        for block, host_block in copies.offloads:
            self._host[host_block].copy_(self._device[block], non_blocking=True)
        for host_block, block in copies.onloads:
            self._device[block].copy_(self._host[host_block], non_blocking=True)
        if not self._is_pinned:
            return lambda: None
        made: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        made.record()
        wait: Callable[[], None] = made.synchronize
        return wait

    def onload_s(self) -> float:
        """Seconds to bring one block back: the best of a few tries. Call it before the first `run`."""
        self._host[0].zero_()  # the target is block 0, which has to stay zero
        plan = Copies(0, [], [(0, 0)] * 8, [])
        seconds = best_s(lambda: self.run(plan), self._device.device, _COPY_TRIES)
        return seconds / len(plan.onloads)

    def close(self) -> None:
        """Unpin the memory. No more copies may follow."""
        if self._is_pinned:
            self._is_pinned = False
            torch.cuda.synchronize(self._device.device)
            _check(_cudart().cudaHostUnregister(self._host.data_ptr()))


def _prefill_s(runner: ModelRunner, num_tokens: int) -> float:
    """Seconds that a step of one prompt takes, on blocks that no request holds yet."""
    request = EngineRequest("", [0] * num_tokens, num_tokens, SamplingParams(max_tokens=1))
    sequence = Sequence(request, 0, 0, runner.layout.block_size)
    sequence.blocks = list(range(1, 1 + runner.layout.num_blocks(num_tokens)))
    sequence.state = State.DONE  # so that the runner keeps no slot for it
    chunk = Chunk(sequence, 0, num_tokens, samples=True)
    seconds = best_s(lambda: runner.launch([chunk]), runner.device, _COMPUTE_TRIES)
    runner.pool.clear(sequence.blocks)
    return seconds


def best_s(action: Callable[[], object], device: torch.device, num_tries: int) -> float:
    """Seconds that `action` and everything it launches take: the best of some tries."""
    times = []
    for _ in range(num_tries):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(error: Any) -> None:
    if int(error):
        raise OperatorError(
            f"the host tier's memory cannot be pinned: CUDA error {int(error)}",
            remedy="set `engine.host_cache_bytes` to less, or raise the limit of locked memory",
        )
