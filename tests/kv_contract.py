"""What every KV transport must do. `TestX(TransferContract)` with a `name` runs all of it."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import msgspec
import numpy as np
import pytest
from kv_ends import (
    LAYOUT,
    OTHER_LAYOUT,
    Got,
    Held,
    params,
    pulling,
    random_blocks,
    serving,
)
from kv_peers import pull_all, relay, talk
from kv_process_contract import ProcessContract
from serving.errors import KvTransferFailed
from serving.framing import frame
from serving.kv_transfer import PrefillProgress
from serving.kv_transfer.messages import WIRE_VERSION, ChannelHello, Pull
from waiting import until

BLOCK = LAYOUT.block_bytes


class TransferContract(ProcessContract):
    scheme: str

    def __init_subclass__(cls) -> None:
        cls.scheme = cls.name.split("-")[0]

    @pytest.mark.parametrize(
        ("num_blocks", "chunk_bytes"),
        [(1, 1 << 20), (7, 3 * BLOCK + 17), (33, 5 * BLOCK), (5, BLOCK // 2), (64, 8 << 20)],
        ids=["one", "odd-end", "many-chunks", "block-above-chunk", "one-chunk"],
    )
    async def test_blocks_arrive_intact(self, num_blocks: int, chunk_bytes: int) -> None:
        blocks = random_blocks(num_blocks)
        held = Held(a=blocks)
        async with (
            serving(self.name, held, chunk_bytes=chunk_bytes) as source,
            pulling(self.name, chunk_bytes=chunk_bytes) as end,
        ):
            got = await pull_all(end, source.address, "a", blocks)
            await until(lambda: held.done_with == ["a"])
        assert max(count for _, count in got.calls) <= max(1, chunk_bytes // BLOCK)

    async def test_only_the_blocks_asked_for_arrive(self) -> None:
        blocks = random_blocks(40)
        async with serving(self.name, Held(a=blocks)) as source, pulling(self.name) as end:
            got = Got(blocks)
            assert await end.pull(params(source.address, "a", 40), 11, 20, got) == 20 * BLOCK
        assert np.array_equal(got.blocks[11:31], blocks[11:31])
        assert not got.blocks[:11].any()
        assert not got.blocks[31:].any()

    async def test_endpoints_with_different_chunk_sizes_use_the_smaller_one(self) -> None:
        blocks = random_blocks(23)
        for mine, theirs in [(2 * BLOCK, 8 * BLOCK), (8 * BLOCK, 3 * BLOCK)]:
            async with (
                serving(self.name, Held(a=blocks), chunk_bytes=theirs) as source,
                pulling(self.name, chunk_bytes=mine) as end,
            ):
                got = await pull_all(end, source.address, "a", blocks)
            assert max(count for _, count in got.calls) == min(mine, theirs) // BLOCK

    async def test_pull_of_no_blocks_lets_the_source_release_them(self) -> None:
        held = Held(a=random_blocks(4))
        async with serving(self.name, held) as source, pulling(self.name) as end:
            got = Got(held.requests["a"])
            assert await end.pull(params(source.address, "a", 4), 4, 0, got) == 0
            await until(lambda: held.done_with == ["a"])
        assert not got.calls

    async def test_eight_pulls_at_once(self) -> None:
        requests = {f"r{i}": random_blocks(20 + i, seed=i) for i in range(8)}
        held = Held(**requests)
        async with (
            serving(self.name, held, chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK) as end,
        ):
            for _ in range(2):  # the second time over the channels of the first time
                await asyncio.gather(
                    *(pull_all(end, source.address, key, value) for key, value in requests.items())
                )
            await until(lambda: sorted(held.done_with) == sorted([*requests, *requests]))

    async def test_both_directions_at_once(self) -> None:
        left, right = random_blocks(30, seed=2), random_blocks(31, seed=3)
        async with (
            serving(self.name, Held(a=left)) as one,
            serving(self.name, Held(b=right)) as other,
        ):
            await asyncio.gather(
                *(pull_all(other, one.address, "a", left) for _ in range(3)),
                *(pull_all(one, other.address, "b", right) for _ in range(3)),
            )

    async def test_a_hundred_megabytes(self) -> None:
        blocks = random_blocks(1600)
        async with (
            serving(self.name, Held(a=blocks), chunk_bytes=8 << 20) as source,
            pulling(self.name, chunk_bytes=8 << 20) as end,
        ):
            await pull_all(end, source.address, "a", blocks)

    async def test_blocks_are_pulled_while_the_prefill_computes_them(self) -> None:
        blocks = random_blocks(40)
        held = Held(a=blocks)
        held.computed["a"] = PrefillProgress(10)
        async with serving(self.name, held) as source, pulling(self.name) as end:
            wanted = params(source.address, "a", 40)
            got = Got(blocks)
            assert await end.progress(wanted, 0, 5.0) == (10, None)
            await end.pull(wanted, 0, 10, got, more_follows=True)
            waiting = asyncio.create_task(end.progress(wanted, 10, 5.0))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            held.computed["a"] = PrefillProgress(33)
            assert await waiting == (33, None)
            await end.pull(wanted, 10, 23, got, more_follows=True)
            held.computed["a"] = PrefillProgress(40, 123)
            assert await end.progress(wanted, 33, 5.0) == (40, 123)
            assert not held.done_with
            await end.pull(wanted, 33, 7, got)
            await until(lambda: held.done_with == ["a"])
        assert np.array_equal(got.blocks, blocks)

    async def test_waiting_for_progress_ends_with_the_prefill_the_deadline_and_the_caller(
        self,
    ) -> None:
        blocks = random_blocks(4)
        held = Held(a=blocks)
        held.computed["a"] = PrefillProgress(0)
        async with serving(self.name, held) as source, pulling(self.name) as end:
            wanted = params(source.address, "a", 4)
            guess = msgspec.structs.replace(wanted, nonce="guess")
            with pytest.raises(KvTransferFailed, match="wrong nonce"):
                await end.progress(guess, 0, 5.0)
            with pytest.raises(KvTransferFailed, match=r"within 0\.1 s"):
                await end.progress(wanted, 0, 0.1)
            task = asyncio.create_task(end.progress(wanted, 0, 5.0))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            task = asyncio.create_task(end.progress(wanted, 0, 5.0))
            await asyncio.sleep(0.05)
            held.requests.clear()
            with pytest.raises(KvTransferFailed, match="not held"):
                await task
            held.requests["a"] = blocks
            await pull_all(end, source.address, "a", blocks)
            task = asyncio.create_task(end.progress(wanted, 0, 5.0))
            await asyncio.sleep(0.05)
            await end.close()
            with pytest.raises(KvTransferFailed, match="closed"):
                await task

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"nonce": "guess"}, "wrong nonce"),
            ({"request_id": "b"}, "not held"),
            ({"layout": OTHER_LAYOUT.fingerprint}, "layout"),
            ({"address": "http://127.0.0.1:1"}, "not an address"),
            ({"address": "nonsense:port"}, "not an address"),
        ],
    )
    async def test_refusal_names_its_reason(self, changes: dict[str, str], reason: str) -> None:
        blocks = random_blocks(4)
        held = Held(a=blocks)
        async with serving(self.name, held) as source, pulling(self.name) as end:
            got = Got(blocks)
            bad = msgspec.structs.replace(params(source.address, "a", 4), **changes)
            with pytest.raises(KvTransferFailed, match=reason):
                await end.pull(bad, 0, 4, got)
            assert not got.calls
            assert not held.done_with
            await pull_all(end, source.address, "a", blocks)

    @pytest.mark.parametrize(("first", "num"), [(0, 5), (3, 2), (-1, 2), (2, -1), (9, 0)])
    async def test_blocks_beyond_those_held_are_refused(self, first: int, num: int) -> None:
        held = Held(a=random_blocks(4))
        async with serving(self.name, held) as source, pulling(self.name) as end:
            with pytest.raises(KvTransferFailed, match="4 held"):
                await end.pull(params(source.address, "a", 4), first, num, Got(random_blocks(4)))
        assert not held.done_with

    async def test_source_refuses_another_layout_by_itself(self) -> None:
        async with (
            serving(self.name, Held(a=random_blocks(4))) as source,
            pulling(self.name, OTHER_LAYOUT) as end,
        ):
            theirs = params(source.address, "a", 4, OTHER_LAYOUT)
            with pytest.raises(KvTransferFailed, match="layout"):
                await end.pull(theirs, 0, 4, Got(random_blocks(4)))

    async def test_source_that_cannot_read_fails_the_pull_and_is_not_done(self) -> None:
        blocks = random_blocks(40)
        held = Held(a=blocks)
        async with (
            serving(self.name, held, chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK) as end,
        ):
            held.error = KeyError("a")
            with pytest.raises(KvTransferFailed, match="released meanwhile"):
                await end.pull(params(source.address, "a", 40), 0, 40, Got(blocks))
            held.error = None
            assert not held.done_with
            await pull_all(end, source.address, "a", blocks)

    async def test_error_of_the_sink_reaches_the_caller_and_the_source_is_not_done(self) -> None:
        blocks = random_blocks(40)
        held = Held(a=blocks)
        async with (
            serving(self.name, held, chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK) as end,
        ):
            got = Got(blocks)
            got.error = ZeroDivisionError()
            with pytest.raises(ZeroDivisionError):
                await end.pull(params(source.address, "a", 40), 0, 40, got)
            assert not held.done_with
            await pull_all(end, source.address, "a", blocks)

    async def test_cancelled_pull_touches_the_sink_no_more_and_the_next_one_works(self) -> None:
        blocks = random_blocks(64)
        held = Held(a=blocks)
        async with (
            serving(self.name, held, chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK) as end,
        ):
            for _ in range(12):  # more often than there are staging buffers
                got = Got(blocks)
                got.pause_s = 0.02
                task = asyncio.create_task(end.pull(params(source.address, "a", 64), 0, 64, got))
                await until(got.started.is_set)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                num_calls = len(got.calls)
                assert got.ended.is_set(), "a scatter was still running"
                await asyncio.sleep(0.03)
                assert len(got.calls) == num_calls
            assert not held.done_with
            await pull_all(end, source.address, "a", blocks)

    async def test_deadline_ends_a_pull_from_a_slow_source(self) -> None:
        blocks = random_blocks(40)
        held = Held(a=blocks)
        held.pause_s = 0.3
        async with (
            serving(self.name, held, chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK, transfer_s=0.5) as end,
        ):
            started = time.monotonic()
            with pytest.raises(KvTransferFailed, match=r"not complete within 0\.5 s"):
                await end.pull(params(source.address, "a", 40), 0, 40, Got(blocks))
            assert time.monotonic() - started < 2
            assert not held.done_with

    async def test_source_ends_a_pull_that_takes_too_long(self) -> None:
        blocks = random_blocks(640)  # more than sockets buffer
        held = Held(a=blocks)
        async with (
            serving(self.name, held, chunk_bytes=32 * BLOCK, transfer_s=0.3) as source,
            pulling(self.name, chunk_bytes=32 * BLOCK) as end,
        ):
            got = Got(blocks)
            got.pause_s = 0.2
            with pytest.raises(KvTransferFailed):
                await end.pull(params(source.address, "a", 640), 0, 640, got)
            assert not held.done_with
            got.pause_s = 0
            await pull_all(end, source.address, "a", blocks)

    async def test_pull_fails_at_once_when_nothing_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        async with pulling(self.name) as end:
            started = time.monotonic()
            with pytest.raises(KvTransferFailed, match="not reached"):
                await end.pull(
                    params(f"{self.scheme}://127.0.0.1:{port}", "a", 4), 0, 4, Got(random_blocks(4))
                )
            assert time.monotonic() - started < 3  # UCX itself starts in this time

    async def test_pull_from_a_silent_listener_fails_at_the_connect_deadline(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"{self.scheme}://127.0.0.1:{silent.getsockname()[1]}"
            async with pulling(self.name, connect_s=0.2) as end:
                with pytest.raises(KvTransferFailed, match=r"nothing within 0\.2 s"):
                    await end.pull(params(address, "a", 4), 0, 4, Got(random_blocks(4)))

    async def test_channel_lost_while_idle_is_replaced(self) -> None:
        blocks = random_blocks(20)
        async with (
            serving(self.name, Held(a=blocks)) as source,
            pulling(self.name) as end,
            relay(source.address) as (address, cut),
        ):
            for _ in range(3):
                await pull_all(end, address, "a", blocks)
                await cut()

    async def test_channel_is_kept_between_pulls(self) -> None:
        blocks = random_blocks(4)
        async with serving(self.name, Held(a=blocks)) as source, pulling(self.name) as end:
            await pull_all(end, source.address, "a", blocks)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                await pull_all(end, source.address, "a", blocks)
            assert len(os.listdir("/proc/self/fd")) <= before

    async def test_garbage_from_a_peer_does_not_end_the_service(self) -> None:
        blocks = random_blocks(20)
        held = Held(a=blocks)
        junk = np.random.default_rng(4).bytes(4096)
        hello = frame(ChannelHello(WIRE_VERSION, self.scheme, junk[:200]))
        unasked = frame(Pull("a", "guess", LAYOUT.fingerprint, 0, 4, 4, 0))
        huge = frame(Pull("a", "n-a", LAYOUT.fingerprint, 0, 1 << 62, 1 << 62, -1))
        async with serving(self.name, held) as source, pulling(self.name) as end:
            for payloads in [
                (junk,),
                (b"\xff" * 4,),
                (b"\x00" * 64,),
                (b"GET / HTTP/1.1\r\n\r\n",),
                (frame(ChannelHello(99, self.scheme)),),
                (frame(ChannelHello(WIRE_VERSION, "pigeon")),),
                (unasked,),
                (hello, unasked),
                (hello, hello),
                (hello, huge),
                (hello, frame({"type": "pull"})),
                (),
            ]:
                await asyncio.to_thread(talk, source.address, *payloads)
            assert not held.done_with
            await pull_all(end, source.address, "a", blocks)

    async def test_close_fails_pulls_under_way(self) -> None:
        blocks = random_blocks(64)
        async with (
            serving(self.name, Held(a=blocks), chunk_bytes=4 * BLOCK) as source,
            pulling(self.name, chunk_bytes=4 * BLOCK) as end,
        ):
            got = Got(blocks)
            got.pause_s = 0.05
            task = asyncio.create_task(end.pull(params(source.address, "a", 64), 0, 64, got))
            await until(got.started.is_set)
            await end.close()
            assert task.done()
            with pytest.raises(KvTransferFailed, match="closed"):
                await task
            with pytest.raises(KvTransferFailed, match="closed"):
                await pull_all(end, source.address, "a", blocks)

    async def test_closing_source_fails_pulls_from_it(self) -> None:
        blocks = random_blocks(64)
        held = Held(a=blocks)
        async with pulling(self.name, chunk_bytes=4 * BLOCK) as end:
            async with serving(self.name, held, chunk_bytes=4 * BLOCK) as source:
                # The source is slow, not the sink: 4 MiB may all be on their way in socket buffers.
                held.pause_s = 0.1
                got = Got(blocks)
                task = asyncio.create_task(end.pull(params(source.address, "a", 64), 0, 64, got))
                await until(got.started.is_set)
            with pytest.raises(KvTransferFailed):
                await task
        assert not held.done_with
