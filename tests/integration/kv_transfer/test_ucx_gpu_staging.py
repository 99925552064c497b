"""The contract of transports where both workers stage on a GPU, with stand-ins for the GPU's driver.
Also: what happens when the two cannot map each other's memory."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from kv_contract import TransferContract
from kv_ends import GpuInHostMemory, Held, pulling, random_blocks, serving
from kv_peers import pull_all

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
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocks = random_blocks(20)
        far, near = GpuInHostMemory(process="far"), GpuInHostMemory(process="near", maps=False)
        with caplog.at_level(logging.WARNING):
            async with (
                serving(self.name, Held(a=blocks), gpu=far) as source,
                pulling(self.name, gpu=near) as end,
            ):
                got = await pull_all(end, source.address, "a", blocks)
                await pull_all(end, source.address, "a", blocks)
        assert not got.on_gpu
        assert caplog.text.count("comes through host memory: no peer access") == 1
