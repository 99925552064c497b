"""Latents (MLA) on a real GPU: the paged kernel, CUDA graphs, and tokens equal to `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engine.torch.cuda.kernels.latent_decode import latent_decode
from serving.engine.torch.cuda.latent_step import absorbed_chunk, gathered_decode
from serving.engine.torch.latent import Latent
from unit.engine.latent_models import FAMILIES, tiny
from unit.engine.torch_rig import generate, greedy, random_prompts, request, running, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize(
    ("rank", "rope", "heads"), [(512, 64, 16), (512, 64, 128), (512, 64, 20), (256, 32, 40)]
)
def test_paged_latents_equal_gathered_ones(
    dtype: torch.dtype, tolerance: float, rank: int, rope: int, heads: int
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    how = {"generator": generator, "device": "cuda"}
    size, width = 16, 200
    tokens = torch.randn((1 + 4 * width, 3, size, rank + rope), **how).to(dtype)[:, 1]
    query = torch.randn((4, heads, rank + rope), **how).to(dtype)
    tables = 1 + torch.randperm(4 * width, **how).view(4, width).int()
    slots = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([1, size * width, 777, 64], dtype=torch.int32, device="cuda")
    paged = (query, tokens, tables, slots, lengths)
    scale = (rank + rope) ** -0.5
    expected = gathered_decode(*paged, rank=rank, longest=size * width, scale=scale).float()
    for splits in (1, 7, 32):
        ours = latent_decode(*paged, rank=rank, splits=splits, scale=scale).float()
        assert float((ours - expected).norm() / expected.norm()) < tolerance


def test_an_absorbed_chunk_equals_an_expanded_one() -> None:
    latent = Latent(torch.randn(16 * 256, 512) / 512**0.5, 16, 128, 64, 128).cuda()
    query, kept = torch.randn(16, 40, 192).cuda(), torch.randn(300, 576).cuda()
    key, value = latent.expand(kept[None])
    mask = torch.ones(40, 300, dtype=torch.bool, device="cuda").tril(260)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.1)
    ours = absorbed_chunk(query, kept, latent, 0.1)
    torch.testing.assert_close(ours, expected.transpose(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_equal_generate(family: str, tmp_path: Path) -> None:
    """8 at a time, in chunks, and again with prefix hits; decodes by graphs."""
    model = save_model(tmp_path, tiny(family))
    prompts = random_prompts([5, 40, 17, 64, 33, 8, 90, 21])
    expected = [generate(model, prompt, 16) for prompt in prompts]
    async with running(model, device="cuda", max_num_batched_tokens=32) as (engine, sink):
        runner: Any = engine._runner
        assert runner._has_paged_kernel
        # Experts in float32 may look at values on the host, and run without graphs then.
        assert runner._graphs or family != "minicpm3"
        for turn in "ab":
            for index, prompt in enumerate(prompts):
                engine.submit(request(f"{turn}{index}", prompt, greedy(16)))
            await sink.finished(*(f"{turn}{index}" for index in range(len(prompts))))
            assert [sink.tokens[f"{turn}{i}"] for i in range(len(prompts))] == expected
        assert sink.cached["b6"] >= 80


async def test_bfloat16_runs_and_is_the_same_in_every_batch(tmp_path: Path) -> None:
    model = save_model(tmp_path, tiny("minicpm3"))
    [prompt] = random_prompts([40])
    async with running(model, device="cuda", dtype="bfloat16") as (engine, sink):
        for name in ("alone", "again"):
            engine.submit(request(name, prompt, greedy(12)))
            await sink.finished(name)
        assert not torch.isnan(engine._runner.pool.tensor.float()).any()
    assert len(sink.tokens["alone"]) == len(sink.tokens["again"]) == 12
