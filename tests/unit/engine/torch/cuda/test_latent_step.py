"""Latents on the CUDA path, with Triton's interpreter in place of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install -e '.[test]'")

from serving.engine.torch.cuda import latent_step
from serving.engine.torch.cuda.kernels.latent_decode import latent_decode, num_latent_splits
from serving.engine.torch.cuda.latent_step import absorbed_chunk, can_decode, gathered_decode
from serving.engine.torch.kv.pool import KvPool
from serving.engine.torch.latent import Latent
from serving.kv_layout import KvLayout
from unit.engine.interpreted_cuda import InterpretedRunner
from unit.engine.interpreted_cuda import no_gpu as no_gpu
from unit.engine.latent_models import tiny
from unit.engine.torch_rig import generate, greedy, random_prompts, request, running, save_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu has the same on the GPU that is here"
)

LAYOUT = KvLayout.uniform(2, 1, 20, 8, "float32", 1)


@pytest.mark.parametrize(("rank", "rope", "heads"), [(32, 8, 4), (40, 16, 20)])
def test_paged_latents_equal_gathered_ones(rank: int, rope: int, heads: int) -> None:
    """More heads than one program has, sizes that are no powers of two, and an empty row."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((9, 3, 4, rank + rope), generator=generator)[:, 1]
    query = torch.randn((3, heads, rank + rope), generator=generator)
    tables = torch.tensor([[3, 1, 7], [4, 2, 8], [5, 6, 0]], dtype=torch.int32)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    lengths = torch.tensor([7, 11, 0], dtype=torch.int32)
    paged = (query, tokens, tables, slots, lengths)
    expected = gathered_decode(*paged, rank=rank, longest=11, scale=0.3)
    for splits in (1, 3):
        ours = latent_decode(*paged, rank=rank, splits=splits, scale=0.3)
        torch.testing.assert_close(ours[:2], expected[:2])
        assert not ours[2].any()
    assert latent_decode(*(x[:0] for x in paged[:1]), *paged[1:], rank=rank, splits=1, scale=1.0).shape == (0, heads, rank)  # fmt: skip


def test_splits_fill_the_gpu_without_cutting_short_sequences() -> None:
    assert num_latent_splits(1, 16, 100_000, 132) == 64
    assert num_latent_splits(64, 16, 100_000, 132) == 4
    assert num_latent_splits(256, 128, 100_000, 132) == 1
    assert num_latent_splits(1, 16, 64, 132) == 1


def test_an_absorbed_chunk_in_parts_equals_an_expanded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = Latent(torch.randn((4 * 12, 16), generator=generator), 4, 8, 4, 4)
    query, kept = (torch.randn(shape, generator=generator) for shape in ((4, 5, 12), (9, 20)))
    key, value = latent.expand(kept[None])
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    for size in (1 << 28, 4 * 4 * 9 * 2):
        monkeypatch.setattr(latent_step, "_SCORES_BYTES", size)
        torch.testing.assert_close(
            absorbed_chunk(query, kept, latent, 0.3), expected.transpose(0, 1)
        )


@pytest.mark.parametrize("how", ["paged", "gathered", "absorbed chunks"])
async def test_tokens_equal_generate(
    how: str, tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, a prefix hit, and decodes beside prefill; by graphs where the kernel is used."""

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("out of resources")

    if how == "gathered":
        monkeypatch.setattr(latent_step, "latent_decode", fails)
    if how == "absorbed chunks":
        monkeypatch.setattr(Latent, "can_expand", lambda *_: False)
    model = save_model(tmp_path, tiny("deepseek_v3"))
    prompts = random_prompts([19, 5])
    expected = [generate(model, prompt, 4) for prompt in prompts]
    async with running(model, runner_class=InterpretedRunner, max_num_batched_tokens=12) as (
        engine,
        sink,
    ):
        for index, prompt in enumerate(prompts):
            engine.submit(request(f"a{index}", prompt, greedy(4)))
        await sink.finished("a0", "a1")
        engine.submit(request("b0", prompts[0], greedy(4)))
        await sink.finished("b0")
        cuda: Any = engine._runner
        assert bool(cuda._graphs) is (how != "gathered")
        assert cuda.rewrites.replaced["norms"]
        assert not cuda.pool.tensor[0].any()
    assert [sink.tokens["a0"], sink.tokens["a1"]] == expected
    assert (sink.tokens["b0"], sink.cached["b0"]) == (expected[0], 16)


def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latent = Latent(torch.randn(4 * 12, 16), 4, 8, 4, 4)
    pool = KvPool(LAYOUT, 6, "cpu")
    assert can_decode(latent, pool)

    def wrong(query: torch.Tensor, tokens: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        return latent_decode(query, tokens.roll(1, dims=-1), *rest, **how)

    monkeypatch.setattr(latent_step, "latent_decode", wrong)
    assert not can_decode(latent, pool)
    assert not pool.tensor.any()
