"""Chunk sizes of a transfer."""

from __future__ import annotations

from kv_ends import LAYOUT, GpuInHostMemory
from serving.kv_transfer.staging import GPU_SIZES, HOST_SIZES, StagingMemory


def test_short_transfers_use_smaller_chunks_on_a_gpu() -> None:
    staging = StagingMemory(LAYOUT, None, GpuInHostMemory(), lambda _: None)
    mib = (1 << 20) // LAYOUT.block_bytes
    sizes = [staging.chunk_blocks(True, n * mib) // mib for n in (8, 128, 256, 1024, 4096)]
    assert sizes == [32, 64, 128, 256, 256]
    assert staging.chunk_blocks(False, 4096 * mib) * LAYOUT.block_bytes == HOST_SIZES.chunk_bytes
    assert GPU_SIZES.depth <= GPU_SIZES.num_buffers
