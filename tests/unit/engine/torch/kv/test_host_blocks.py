"""The memory of the host tier: copies keep content, and books agree, whatever is evicted."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from serving.engine.core.block_pool import BlockPool
from serving.engine.core.host_tier import Copies, HostTier
from serving.engine.torch.kv.host_blocks import HostBlocks
from serving.engine.torch.kv.pool import KvPool
from serving.errors import OperatorError
from serving.kv_layout import KvLayout
from serving.protocol import BlocksRemoved, BlocksStored, KvEvent

LAYOUT = KvLayout.uniform(num_layers=1, num_kv_heads=1, head_dim=4, block_size=8, dtype="float32")


class Rig:
    """A pool whose blocks hold their hash as content, and a router that hears of it."""

    def __init__(self, num_blocks: int, num_host_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, HostTier(num_host_blocks))
        self.kv = KvPool(LAYOUT, num_blocks, "cpu")
        self.host = HostBlocks(self.kv, num_host_blocks * LAYOUT.block_bytes)
        self.told: dict[str, set[int]] = {"device": set(), "host": set()}

    def hear(self) -> None:
        for event in self.pool.take_events():
            self._apply(event)
        assert self.told["device"] == self.pool.stored_hashes()
        assert self.told["host"] == self.pool.host.stored_hashes()

    def _apply(self, event: KvEvent) -> None:
        assert isinstance(event, BlocksStored | BlocksRemoved)
        hashes, told = set(event.block_hashes), self.told[event.tier]
        if isinstance(event, BlocksStored):
            assert not told & hashes
            chain = [event.parent_hash, *event.block_hashes]
            for parent, value in pairwise(chain):
                assert value is not None
                assert parent == (value - 1 if value % 10 else None)
            told |= hashes
            assert self.told["device"] >= hashes
        else:
            assert told >= hashes
            told -= hashes

    def content(self, block: int) -> set[float]:
        return set(self.kv.tensor[block].flatten().tolist())


@pytest.mark.parametrize("num_host_blocks", [1, 5, 40])
@pytest.mark.parametrize("seed", range(4))
def test_random_use_keeps_content_events_and_books(num_host_blocks: int, seed: int) -> None:
    """Plans are carried out up to two steps after they were made, as an engine does that looks
    ahead; whatever a step reads is then what its hash says."""
    rng = random.Random(seed)
    rig, num_found = Rig(14, num_host_blocks), 0
    pool = rig.pool
    # (copies, blocks to read with their hashes, blocks to fill and store from which index on)
    steps: list[tuple[Copies, list[int], list[int], int]] = []
    held: list[list[int]] = []

    def finish() -> None:
        copies, blocks, hashes, num_stored = steps.pop(0)
        rig.host.run(copies)
        for block, value in zip(blocks[:num_stored], hashes, strict=False):
            assert rig.content(block) == {float(value)}
        for block, value in zip(blocks[num_stored:], hashes[num_stored:], strict=False):
            rig.kv.tensor[block] = value
        pool.copied(copies)
        parent = hashes[num_stored - 1] if num_stored else None
        new = slice(num_stored, len(hashes))
        blocks[new] = pool.store(blocks[new], hashes[new], parent)
        held.append(blocks)

    for _ in range(1500):
        busy = sum(len(blocks) for _, blocks, _, _ in steps)
        if len(steps) == 2 or (steps and rng.random() < 0.3):
            finish()
        elif held and (pool.num_available < 6 or rng.random() < 0.4):
            pool.release(held.pop(rng.randrange(len(held))))
        elif pool.num_available >= 6:
            stem = rng.randrange(1, 8)
            hashes = [stem * 10 + depth for depth in range(rng.randrange(1, 5))]
            matched = pool.match(hashes)
            num_new = len(hashes) - len(matched) + 1
            assert pool.fits(matched, num_new)
            if rng.random() < 0.1:  # aborted before its step
                blocks, _ = pool.claim(matched, hashes, num_new)
                pool.release(blocks)
            else:
                blocks, num_stored = pool.claim(matched, hashes, num_new)
                num_found += num_stored - len(matched)
                steps.append((pool.take_copies(), blocks, hashes, num_stored))
        rig.hear()
        pool.check_integrity([*held, *(blocks for _, blocks, _, _ in steps)])
        assert busy <= 14
    assert num_found > 20


def test_too_little_memory_is_refused_with_the_size_that_is_needed() -> None:
    kv = KvPool(LAYOUT, 2, "cpu")
    with pytest.raises(OperatorError, match=f"set it to {LAYOUT.block_bytes} or more"):
        HostBlocks(kv, LAYOUT.block_bytes - 1)
    with pytest.raises(OperatorError, match="set it to less"):
        HostBlocks(kv, 2**60)


def test_measuring_leaves_the_padding_block_zero() -> None:
    kv = KvPool(LAYOUT, 2, "cpu")
    assert HostBlocks(kv, 3 * LAYOUT.block_bytes).onload_s() > 0
    assert not kv.tensor.any()


def test_copies_are_bytes_whatever_the_dtype() -> None:
    layout = KvLayout.uniform(1, 1, 4, 8, "float8_e4m3fn")
    kv = KvPool(layout, 2, "cpu")
    host = HostBlocks(kv, 2 * layout.block_bytes)
    values = torch.arange(64, dtype=torch.float32).view(1, 2, 8, 1, 4).to(torch.float8_e4m3fn)
    kv.tensor[1].copy_(values)
    host.run(Copies(1, [(1, 0)], [(0, 2)], [1]))()
    assert torch.equal(kv.tensor[2].float(), values.float())
