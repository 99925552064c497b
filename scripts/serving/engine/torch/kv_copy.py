"""Copies between scattered blocks of a pool on a GPU and packed staging memory, and from the
blocks of another GPU's pool.

One kernel a chunk, on a stream of its own: a copy neither waits for the engine's steps nor holds
them up, and only its own end is waited for. The kernel takes the pool as `[blocks, parts, bytes]`
with any strides between blocks and parts, so the pool decides about its layout alone.
"""

from __future__ import annotations

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


@triton.jit  # type: ignore[untyped-decorator]
def _fetch_kernel(  # type: ignore[no-untyped-def]
    pool,
    address,
    blocks,
    num_pieces,
    BLOCK_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program i: pieces i, i + programs, ... of all blocks; piece = `WORDS` words of one block.

    `blocks` is int32 `[n, 2]`: where to in `pool`, where from in the pool at `address`.
    """
    there = address.to(pool.dtype)
    pieces: tl.constexpr = (BLOCK_WORDS + WORDS - 1) // WORDS
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        row = piece // pieces
        target = tl.load(blocks + 2 * row).to(tl.int64) * BLOCK_WORDS
        source = tl.load(blocks + 2 * row + 1).to(tl.int64) * BLOCK_WORDS
        words = (piece % pieces) * WORDS + tl.arange(0, WORDS)
        inside = words < BLOCK_WORDS
        tl.store(pool + target + words, tl.load(there + source + words, mask=inside), mask=inside)


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
        num_bytes = self._pool[0].numel()
        assert self._pool.is_contiguous(), "blocks without gaps, as in the other pool"
        size, dtype = next((s, d) for s, d in _WORD_TYPES if not (num_bytes | source.address) % s)
        words = min(_FETCH_WORDS, triton.next_power_of_2(num_bytes // size))
        num_pieces = len(blocks) * triton.cdiv(num_bytes // size, words)

        def copy(index: torch.Tensor) -> None:
            _fetch_kernel[(min(num_pieces, _FETCH_PROGRAMS),)](
                self._pool.view(dtype),
                source.address,
                index,
                num_pieces,
                BLOCK_WORDS=num_bytes // size,
                WORDS=words,
                num_warps=_FETCH_WARPS,
            )

        self._run(copy, np.column_stack((blocks, source.block_ids)))

    def _run(
        self, copy: Callable[[torch.Tensor], None], blocks: Sequence[int] | np.ndarray
    ) -> None:
        with torch.cuda.stream(self._stream):
            index = torch.from_numpy(np.asarray(blocks, np.int32)).to(self._pool.device)
            copy(index)
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._stream)
        ended.synchronize()  # not the stream: others may have queued copies behind this one
