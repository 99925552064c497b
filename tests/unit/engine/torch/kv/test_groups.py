"""Layers whose KV has several shapes, or that read the KV of others: blocks, access and the probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving.engine.torch.attention import AttentionOptions
from serving.engine.torch.kv.config_layout import kv_layout
from serving.engine.torch.kv.pool import KvPool, LayerKv
from serving.engine.torch.kv.step_access import access_of
from serving.engine.torch.probe import Probe
from serving.engine.torch.weights.supported import require_equal_layers
from serving.errors import ModelError
from serving.kv_layout import KvGroup, KvLayout
from transformers import CONFIG_MAPPING

SIZE = 4
GROUPS = (KvGroup(2, 2, 8, 8), KvGroup(1, 1, 16, 4))
LAYOUT = KvLayout(GROUPS, SIZE, "float32")
UNIFORM = KvLayout.uniform(3, 2, 8, SIZE, "float32")


def filled(layout: KvLayout, blocks: list[int], seed: int = 0) -> tuple[KvPool, list[torch.Tensor]]:
    """A pool whose `blocks` hold the tokens of one sequence, and what was written: of each layer keys
    and values `[H, T, D]`."""
    pool = KvPool(layout, 6, "cpu")
    generator = torch.Generator().manual_seed(seed)
    positions = np.arange(len(blocks) * SIZE)
    access = access_of(pool, np.asarray(blocks)[positions // SIZE], positions % SIZE)
    access.add_part(np.asarray([blocks]), len(positions))
    written = []
    layers = [group for group in layout.groups for _ in range(group.num_layers)]
    for row, group in enumerate(layers):
        kept = [
            torch.randn((group.num_kv_heads, len(positions), dim), generator=generator)
            for dim in (group.key_dim, group.value_dim)
        ]
        access.write(row, kept)
        written += kept
        for found, own in zip(access.read(row, 0, torch.float32), kept, strict=True):
            assert torch.equal(found[0], own)
    return pool, written


@pytest.mark.parametrize("layout", [LAYOUT, UNIFORM], ids=["groups", "uniform"])
def test_a_block_is_group_after_group_layer_after_layer_keys_then_values(layout: KvLayout) -> None:
    pool, written = filled(layout, [3, 5])
    out = bytearray(2 * layout.block_bytes)
    pool.gather([3, 5], out)
    found = torch.frombuffer(out, dtype=torch.float32)
    # `[H, T, D]` of a block's tokens are `[block_size, H, D]` on the wire.
    expected = [
        each[:, block * SIZE : (block + 1) * SIZE].transpose(0, 1).flatten()
        for block in range(2)
        for each in written
    ]
    assert torch.equal(found, torch.cat(expected))


def test_blocks_of_groups_are_read_where_another_pool_put_them() -> None:
    source, written = filled(LAYOUT, [1, 2])
    out = bytearray(2 * LAYOUT.block_bytes)
    source.gather([1, 2], out)
    target = KvPool(LAYOUT, 6, "cpu")
    target.scatter([6, 4], out)
    access = access_of(target, np.asarray([], dtype=np.int64), np.asarray([], dtype=np.int64))
    access.add_part(np.asarray([[6, 4]]), 2 * SIZE - 1)
    key, value = access.read(2, 0, torch.float32)
    assert torch.equal(key[0], written[4][:, :-1])
    assert torch.equal(value[0], written[5][:, :-1])


def test_layouts_that_differ_in_a_group_cannot_exchange_blocks() -> None:
    other = KvLayout((GROUPS[0], KvGroup(1, 1, 4, 16)), SIZE, "float32")
    assert other.block_bytes == LAYOUT.block_bytes
    assert other.fingerprint != LAYOUT.fingerprint
    assert LAYOUT.fingerprint == KvLayout(GROUPS, SIZE, "float32").fingerprint


def test_the_probe_learns_groups_and_who_reads_the_kv_of_whom() -> None:
    probe = Probe()
    options = AttentionOptions(1.0, None, None, None)
    query = torch.zeros(4, 1, 8)

    def kv(heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(heads, 1, dim), torch.zeros(heads, 1, dim)

    small, large = kv(2, 8), kv(1, 16)
    for layer, (key, value) in enumerate([kv(2, 8), large, small, large, small, kv(1, 16)]):
        probe.attend(layer, query, key, value, options)
    assert probe.layout(SIZE, "auto").groups == (KvGroup(2, 2, 8, 8), KvGroup(2, 1, 16, 16))
    assert probe.layers() == {
        0: LayerKv(0),
        2: LayerKv(1),
        1: LayerKv(2),
        5: LayerKv(3),
        3: LayerKv(2, writes=False),
        4: LayerKv(1, writes=False),
    }


def test_cuda_refuses_layers_that_differ_or_share() -> None:
    config = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=6, num_kv_shared_layers=0)
    with pytest.raises(ModelError, match="CUDA") as failure:
        require_equal_layers(kv_layout(config, SIZE, "bfloat16"), 6)
    assert "engine.device: cpu" in failure.value.remedy
    shared = CONFIG_MAPPING["gemma3n_text"]()
    layout = kv_layout(shared, SIZE, "bfloat16")
    assert layout.groups == (KvGroup(20, 2, 256, 256),)
    with pytest.raises(ModelError, match="CUDA"):
        require_equal_layers(layout, shared.num_hidden_layers)
    require_equal_layers(UNIFORM, 3)
