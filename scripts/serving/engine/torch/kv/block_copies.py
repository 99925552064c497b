"""Copies between scattered blocks of a pool on a GPU and packed staging memory, and from the
blocks of another GPU's pool.

One kernel a chunk, on a stream of its own: a copy neither waits for the engine's steps nor holds
them up, and only its own end is waited for. The kernel takes the pool as `[blocks, parts, bytes]`
with any strides between blocks and parts, so the pool decides about its layout alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from serving.kv_layout import BlocksInPlace

# Per program: 16 KiB of 4-byte words, eight 16-byte accesses for each of 128 threads.
_WORDS = 4096
_WORD_TYPES = ((4, torch.int32), (2, torch.int16), (1, torch.uint8))
# Few programs with much in flight each: 16 of them already read as fast as NVLink lets any kernel
# (0.9 of a copy by the copy engine), and leave the other processors to the engine's steps, which a
# program per 16 KiB slows down by half (measured on two H100).
_FETCH_PROGRAMS, _FETCH_WARPS, _FETCH_WORDS = 32, 8, 16384


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(  # type: ignore[no-untyped-def]
    pool,
    packed,
    blocks,
    block_stride,
    part_stride,
    num_parts,
    part_words,
    INTO_POOL: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program (i, j): words `j * WORDS ...` of part `i % num_parts` of block `i // num_parts`."""
    row = tl.program_id(0)
    block = tl.load(blocks + row // num_parts).to(tl.int64)
    in_pool = pool + block * block_stride + (row % num_parts).to(tl.int64) * part_stride
    in_packed = packed + row.to(tl.int64) * part_words
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = words < part_words
    if INTO_POOL:
        tl.store(in_pool + words, tl.load(in_packed + words, mask=inside), mask=inside)
    else:
        tl.store(in_packed + words, tl.load(in_pool + words, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["num_pieces"])  # type: ignore[untyped-decorator]
def _fetch_kernel(  # type: ignore[no-untyped-def]
    pool,
    address,
    pairs,
    num_pieces,
    BLOCK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program i: pieces i, i + programs, ... of all blocks; a piece is `WORDS` words of one block.

    `pairs` is int32 `[n, 2]`: where to in `pool`, where from in the pool at `address`. It is in
    host memory, so each pair is asked for one piece ahead.
    """
    there = address.to(pool.dtype)
    pieces: tl.constexpr = (BLOCK_WORDS + WORDS - 1) // WORDS
    is_even: tl.constexpr = BLOCK_WORDS % WORDS == 0
    first = tl.program_id(0)
    to = tl.load(pairs + 2 * (first // pieces))
    origin = tl.load(pairs + 2 * (first // pieces) + 1)
    for piece in range(first, num_pieces, tl.num_programs(0)):
        following = piece + tl.num_programs(0)
        pair = pairs + 2 * (following // pieces)
        next_to = tl.load(pair, mask=following < num_pieces, other=0)
        next_origin = tl.load(pair + 1, mask=following < num_pieces, other=0)
        words = (piece % pieces) * WORDS + tl.arange(0, WORDS)
        source = there + origin.to(tl.int64) * BLOCK_WORDS + words
        target = pool + to.to(tl.int64) * BLOCK_WORDS + words
        if is_even:
            tl.store(target, tl.load(source))
        else:
            inside = words < BLOCK_WORDS
            tl.store(target, tl.load(source, mask=inside), mask=inside)
        to = next_to
        origin = next_origin


class _Fetch:
    """The fetch kernel for one pool, compiled once: what a launch costs is on every pull's way."""

    def __init__(self, pool: torch.Tensor) -> None:
        """`pool` is contiguous uint8 `[blocks, ..., bytes]`."""
        num_bytes = pool[0].numel()
        size, dtype = next((s, d) for s, d in _WORD_TYPES if num_bytes % s == 0)
        self._pool = pool.view(dtype)
        self._block_words = num_bytes // size
        self._words = min(_FETCH_WORDS, triton.next_power_of_2(self._block_words))
        self._pairs = threading.local()
        # The values of integers but for alignment do not matter to the compiler.
        self._kernel = _fetch_kernel.warmup(
            self._pool,
            pool.data_ptr(),
            self._pairs_of(1),
            1,
            BLOCK_WORDS=self._block_words,
            WORDS=self._words,
            num_warps=_FETCH_WARPS,
            grid=(1,),
        )

    def __call__(
        self, blocks: Sequence[int], source: BlocksInPlace, stream: torch.cuda.Stream
    ) -> None:
        """Only one at a time from each thread, until `stream` is through with it."""
        assert source.address % 16 == 0, "as all memory of GPUs is"
        pairs = self._pairs_of(len(blocks))
        target = pairs.numpy()
        target[: len(blocks), 0] = blocks
        target[: len(blocks), 1] = source.block_ids
        num_pieces = len(blocks) * triton.cdiv(self._block_words, self._words)
        with torch.cuda.device(self._pool.device):
            self._kernel[(min(num_pieces, _FETCH_PROGRAMS), 1, 1)](
                self._pool,
                source.address,
                pairs,
                num_pieces,
                self._block_words,
                self._words,
                stream=stream.cuda_stream,
            )

    def _pairs_of(self, count: int) -> torch.Tensor:
        """This thread's pinned memory, int32 `[at least count, 2]`."""
        pairs: torch.Tensor | None = getattr(self._pairs, "memory", None)
        if pairs is None or len(pairs) < count:
            shape = (max(1024, triton.next_power_of_2(count)), 2)
            pairs = self._pairs.memory = torch.empty(shape, dtype=torch.int32, pin_memory=True)
        return pairs


def copy_blocks(
    pool: torch.Tensor, packed: torch.Tensor, blocks: torch.Tensor, *, into_pool: bool
) -> None:
    """Copy rows `blocks` (int32 `[n]`) of `pool` to or from `packed`, on the current stream.

    `pool` is uint8 `[blocks, parts, bytes]`, its last dimension contiguous; `packed` is contiguous
    uint8 of `n * parts * bytes`, and 16-byte aligned.
    """
    _, num_parts, num_bytes = pool.shape
    size, dtype = next(
        (size, dtype)
        for size, dtype in _WORD_TYPES
        if not (num_bytes % size or pool.stride(0) % size or pool.stride(1) % size)
    )
    grid = (len(blocks) * num_parts, triton.cdiv(num_bytes // size, _WORDS))
    _copy_kernel[grid](
        pool.view(dtype),
        packed.view(dtype),
        blocks,
        pool.stride(0) // size,
        pool.stride(1) // size,
        num_parts,
        num_bytes // size,
        INTO_POOL=into_pool,
        WORDS=_WORDS,
    )


class BlockCopies:
    """Gathers and scatters for one pool. Safe from any thread."""

    def __init__(self, pool: torch.Tensor) -> None:
        """`pool` as in `copy_blocks`, on a GPU. Compiles both kernels on its block 0."""
        self._pool = pool
        # Before the engine's kernels where both wait for processors: a copy is short.
        self._stream = torch.cuda.Stream(pool.device, priority=-1)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(pool.device))
        scratch = torch.empty(pool[0].numel(), dtype=torch.uint8, device=pool.device)
        self.gather([0], scratch)
        self.scatter([0], scratch)
        self._fetch = _Fetch(pool)
        itself = BlocksInPlace(pool.data_ptr(), np.zeros(1, np.int32), pool[0].numel(), pool)
        self.fetch([0], itself)

    def gather(self, blocks: Sequence[int], out: torch.Tensor) -> None:
        """Into `out` (uint8, on this GPU or in host memory); it is there when this returns."""

        def copy(index: torch.Tensor) -> None:
            packed = out if out.is_cuda else torch.empty_like(out, device=self._pool.device)
            copy_blocks(self._pool, packed, index, into_pool=False)
            if packed is not out:
                out.copy_(packed, non_blocking=True)

        self._run(copy, blocks)

    def scatter(self, blocks: Sequence[int], data: torch.Tensor) -> None:
        """From `data`, which may be reused when this returns."""

        def copy(index: torch.Tensor) -> None:
            packed = data.to(self._pool.device, non_blocking=True)
            copy_blocks(self._pool, packed, index, into_pool=True)

        self._run(copy, blocks)

    def fetch(self, blocks: Sequence[int], source: BlocksInPlace) -> None:
        """From another pool of this layout, which this process has mapped."""
        self._fetch(blocks, source, self._stream)
        self._wait()

    def _run(self, copy: Callable[[torch.Tensor], None], blocks: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream):
            copy(torch.tensor(blocks, dtype=torch.int32, device=self._pool.device))
        self._wait()

    def _wait(self) -> None:
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record(self._stream)
        ended.synchronize()  # not the stream: others may have queued copies behind this one
