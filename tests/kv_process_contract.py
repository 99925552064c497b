"""What every KV transport must do between processes, of which one may freeze or die."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import pytest
from kv_ends import (
    LAYOUT,
    REMOTE_BLOCKS,
    Got,
    Held,
    line_of,
    params,
    process,
    pulling,
    random_blocks,
    serving,
)
from kv_peers import pull_all
from serving.errors import KvTransferFailed
from waiting import until

BLOCK = LAYOUT.block_bytes


class ProcessContract:
    name: str

    async def test_blocks_come_from_another_process(self) -> None:
        with process("serve", self.name) as child:
            async with pulling(self.name) as end:
                await pull_all(end, await line_of(child), "far", random_blocks(REMOTE_BLOCKS))

    async def test_cancelled_pulls_disturb_no_others_and_leak_nothing(self) -> None:
        blocks = random_blocks(REMOTE_BLOCKS)
        rng = random.Random(5)
        with process("serve", self.name) as child:
            async with pulling(self.name, chunk_bytes=8 * BLOCK) as end:
                address = await line_of(child)
                descriptors = f"/proc/{child.pid}/fd"

                async def one(cancel_after_s: float | None) -> None:
                    task = asyncio.create_task(pull_all(end, address, "far", blocks))
                    if cancel_after_s is not None:
                        await asyncio.sleep(cancel_after_s)
                        task.cancel()
                        await asyncio.wait([task])
                    if not task.cancelled():
                        await task

                await asyncio.gather(*(one(None) for _ in range(5)))
                before = len(os.listdir(descriptors))
                for _ in range(12):
                    cancelled = [one(rng.random() * 0.05) for _ in range(3)]
                    await asyncio.gather(one(None), *cancelled, one(None))
                await until(lambda: len(os.listdir(descriptors)) <= before + 2)

    async def test_frozen_source_fails_pulls_and_is_usable_when_it_wakes(self) -> None:
        blocks = random_blocks(REMOTE_BLOCKS)
        with process("serve", self.name, "0.02") as child:
            async with pulling(self.name, chunk_bytes=8 * BLOCK, transfer_s=1.5) as end:
                address = await line_of(child)
                got = Got(blocks)
                task = asyncio.create_task(
                    end.pull(params(address, "far", REMOTE_BLOCKS), 0, REMOTE_BLOCKS, got)
                )
                await until(got.started.is_set)
                child.send_signal(signal.SIGSTOP)
                frozen = time.monotonic()
                try:
                    with pytest.raises(KvTransferFailed, match="not complete"):
                        await task
                    assert time.monotonic() - frozen < 5
                finally:
                    child.send_signal(signal.SIGCONT)
                await asyncio.sleep(2.5)  # it ends what it was sending for nothing
                await pull_all(end, address, "far", blocks)

    async def test_killed_source_fails_the_pull_within_seconds(self) -> None:
        blocks = random_blocks(REMOTE_BLOCKS)
        with process("serve", self.name, "0.05") as child, process("serve", self.name) as other:
            async with pulling(self.name) as end:
                address = await line_of(child)
                got = Got(blocks)
                task = asyncio.create_task(
                    end.pull(params(address, "far", REMOTE_BLOCKS), 0, REMOTE_BLOCKS, got)
                )
                await until(got.started.is_set)
                child.send_signal(signal.SIGKILL)
                killed = time.monotonic()
                with pytest.raises(KvTransferFailed):
                    await task
                assert time.monotonic() - killed < 4
                with pytest.raises(KvTransferFailed, match="not reached"):
                    await pull_all(end, address, "far", blocks)
                await pull_all(end, await line_of(other), "far", blocks)

    async def test_source_survives_a_killed_peer_and_keeps_its_blocks(self) -> None:
        blocks = random_blocks(REMOTE_BLOCKS)
        held = Held(far=blocks)
        async with serving(self.name, held) as source, pulling(self.name) as end:
            with process("pull", self.name, source.address) as child:
                await line_of(child)
                child.send_signal(signal.SIGKILL)
            await asyncio.sleep(0.5)
            assert not held.done_with
            await pull_all(end, source.address, "far", blocks)
