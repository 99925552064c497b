"""The kernel that copies between scattered blocks and packed memory, on the CPU by Triton's
interpreter. tests/gpu runs it where it belongs."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined
pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch")

from serving.engine.torch.kv.block_copies import copy_blocks

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="TRITON_INTERPRET is set to something else"
)


@pytest.mark.parametrize(
    ("num_blocks", "num_parts", "num_bytes"),
    [(9, 1, 3 * 16384 + 64), (7, 6, 1000), (7, 6, 1002), (5, 3, 17)],
    ids=["several-programs", "words", "half-words", "bytes"],
)
@pytest.mark.parametrize("is_block_major", [True, False])
def test_copies_move_exactly_the_named_blocks(
    num_blocks: int, num_parts: int, num_bytes: int, is_block_major: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    if is_block_major:
        pool = random(num_blocks, num_parts, num_bytes)
    else:
        pool = random(num_parts, num_blocks, num_bytes).transpose(0, 1)
    blocks = torch.tensor([3, 1, 4], dtype=torch.int32)
    packed = torch.zeros(3 * num_parts * num_bytes, dtype=torch.uint8)
    copy_blocks(pool, packed, blocks, into_pool=False)
    assert torch.equal(packed.view(3, num_parts, num_bytes), pool[blocks.long()])

    expected, arrived = pool.clone(), random(len(packed))
    expected[blocks.long()] = arrived.view(3, num_parts, num_bytes)
    copy_blocks(pool, arrived, blocks, into_pool=True)
    assert torch.equal(pool, expected)
