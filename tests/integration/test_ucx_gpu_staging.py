"""The same contract where both ends stage on a GPU, with stand-ins for the GPU's driver; and what
happens where the two cannot reach each other's memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from kv_contract import BLOCK, TransferContract, pull_all
from kv_ends import LAYOUT, Got, GpuInHostMemory, Held, params, pulling, random_blocks, serving
from serving.errors import KvTransferFailed
from serving.kv_transfer.memory import GPU, HOST, Staging

pytestmark = pytest.mark.integration


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def ucx_stays_up() -> AsyncIterator[None]:
    async with serving("ucx", Held()):
        yield


@pytest.mark.usefixtures("ucx_stays_up")
@pytest.mark.asyncio(loop_scope="class")
class TestUcxOnGpu(TransferContract):
    name = "ucx-gpu"

    async def test_chunks_are_staged_on_the_gpu(self) -> None:
        blocks = random_blocks(20)
        async with serving(self.name, Held(a=blocks)) as source, pulling(self.name) as end:
            got = await pull_all(end, source.address, "a", blocks)
        assert got.on_gpu

    @pytest.mark.parametrize(("puller", "source"), [("ucx-gpu", "ucx"), ("ucx", "ucx-gpu")])
    async def test_one_end_without_a_gpu_means_host_memory(
        self, puller: str, source: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocks = random_blocks(20)
        async with serving(source, Held(a=blocks)) as far, pulling(puller) as end:
            got = await pull_all(end, far.address, "a", blocks)
            assert "tcp" in end.route
        assert not got.on_gpu
        assert ("its GPU shares none" in caplog.text) is (puller == "ucx-gpu")

    async def test_memory_that_cannot_be_mapped_means_host_memory_and_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        # As if in another process each, and that process on a GPU without peer access.
        names = map(str, itertools.count())
        monkeypatch.setattr("serving.kv_transfer.memory.this_process", lambda: next(names))
        blocks = random_blocks(20)
        with caplog.at_level(logging.WARNING):
            async with serving(self.name, Held(a=blocks)) as source, pulling(self.name) as end:
                vars(type(end))["gpu"].maps = False
                got = await pull_all(end, source.address, "a", blocks)
                await pull_all(end, source.address, "a", blocks)
        assert not got.on_gpu
        assert caplog.text.count("comes through host memory: no peer access") == 1

    async def test_a_peer_that_asks_for_gpu_memory_without_having_any_is_refused(self) -> None:
        blocks = random_blocks(4)
        async with serving("ucx", Held(a=blocks)) as source, pulling("ucx") as end:
            await pull_all(end, source.address, "a", blocks)
            puller: Any = end._puller  # type: ignore[attr-defined]
            puller._ways = lambda _: _staged()
            puller._staging._on_gpu = puller._staging.pool(False)
            for link in puller._idle[source.address]:
                link.on_gpu = True
            with pytest.raises(KvTransferFailed, match="no GPU memory was offered"):
                await end.pull(params(source.address, "a", 4), 0, 4, Got(blocks))


async def _staged() -> tuple[bool, bool]:
    return True, False


async def test_short_transfers_use_smaller_chunks_on_a_gpu() -> None:
    staging = Staging(LAYOUT, None, GpuInHostMemory(), lambda _: None)
    mib = (1 << 20) // BLOCK
    sizes = [staging.chunk_blocks(True, n * mib) // mib for n in (8, 128, 256, 1024, 4096)]
    assert sizes == [32, 64, 128, 256, 256]
    assert staging.chunk_blocks(False, 4096 * mib) * BLOCK == HOST.chunk_bytes
    assert GPU.depth <= GPU.num_buffers
