"""KV transfer over plain TCP."""

from __future__ import annotations

import os
import threading

from kv_contract import TransferContract
from kv_ends import Held, pulling, random_blocks, serving
from kv_peers import pull_all


class TestTcp(TransferContract):
    name = "tcp"


async def test_close_leaves_no_descriptor_and_no_thread() -> None:
    blocks = random_blocks(20)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with serving("tcp", Held(a=blocks)) as source, pulling("tcp") as end:
            await pull_all(end, source.address, "a", blocks)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-transfer")]
