"""Latent attention: expanded and absorbed, it is what transformers' modules compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from serving.engine.torch.attention import NAME, attend_paged
from serving.engine.torch.build_check.engine_answers import answer
from serving.engine.torch.build_check.serving_check import (
    first_difference,
    reference,
    small_cases,
)
from serving.engine.torch.cpu import int8_weights
from serving.engine.torch.cpu.int8_weights import Int8Linear, quantize_rows
from serving.engine.torch.latent import Latent, keep_latents
from serving.engine.torch.loading import load_model
from serving.errors import ModelError, OperatorError
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling
from unit.engine.latent_models import FAMILIES, NOPE, RANK, ROPE, VALUE, tiny
from unit.engine.torch_rig import (
    SIZES,
    generate,
    greedy,
    random_prompts,
    request,
    running,
    save_model,
)


def attention_of(family: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny(family)).eval()
    return model.model.layers[1].self_attn


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of `[H, T, D]`, by hand: `[T, H, D]`."""
    later = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_expanded_and_absorbed_are_what_the_module_expands(family: str) -> None:
    module = attention_of(family)
    latent = Latent(module.kv_b_proj.weight, 4, NOPE, ROPE, VALUE)
    kept, query = torch.randn(1, 7, RANK + ROPE), torch.randn(4, 7, NOPE + ROPE)
    theirs = module.expand_kv(kept[None, ..., :RANK], kept[None, ..., RANK:])
    ours = latent.expand(kept)
    torch.testing.assert_close(ours, (theirs[0][0], theirs[1][0]))
    expected = attend(query, *ours, scale=0.3)
    absorbed = attend(latent.absorb(query), kept, kept, scale=0.3)
    torch.testing.assert_close(latent.project(absorbed), expected)
    _, padded = latent.expand(kept, pad_values=True)
    torch.testing.assert_close(attend(query, ours[0], padded, 0.3)[..., :VALUE], expected)


@torch.inference_mode()
def test_modules_hand_on_what_the_cache_of_transformers_keeps() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny("deepseek_v3")).eval()
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    assert keep_latents(model) == 2
    seen: list[torch.Tensor] = []

    def observe(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        seen.append(key)
        assert torch.equal(value, key[..., :RANK])
        return query.new_zeros(1, 5, 4, VALUE), None

    AttentionInterface.register("observe", observe)
    model.set_attn_implementation("observe")
    model(torch.arange(5)[None], use_cache=False)
    first = cache.layers[0]
    torch.testing.assert_close(seen[0], torch.cat([first.keys, first.values], dim=-1))


@torch.inference_mode()
def test_int8_weights_are_widened_for_the_absorption() -> None:
    module = attention_of("deepseek_v2")
    layer = Int8Linear(*quantize_rows(module.kv_b_proj.weight), None)
    module.kv_b_proj = layer
    model: Any = nn.ModuleList([module])
    model.config = tiny("deepseek_v2")
    keep_latents(model)
    assert torch.equal(module.kv_b_proj.weight, layer.plain_weight())


def test_expansion_is_for_many_queries_and_what_fits_in_memory() -> None:
    deepseek = Latent(torch.empty(16 * 256, 512), 16, 128, 64, 128)
    assert deepseek.prefers_expansion(512, 4096)
    assert not deepseek.prefers_expansion(16, 4096)
    assert deepseek.prefers_expansion(2048, 30_000)
    assert not deepseek.prefers_expansion(2048, 40_000)


def _biased(module: Any) -> None:
    module.kv_b_proj.bias = nn.Parameter(torch.ones(len(module.kv_b_proj.weight)))


def _values_first(module: Any) -> None:
    expand, nope = type(module).expand_kv, NOPE

    def swapped(latent: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = expand(module, latent, shared)
        return torch.cat([key[..., nope:], key[..., :nope]], dim=-1), value

    module.expand_kv = swapped


def _nameless(module: Any) -> None:
    del module.kv_lora_rank


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_biased, "keys would differ"),
        (_values_first, "keys would differ"),
        (_nameless, "no attribute 'kv_lora_rank'"),
    ],
)
def test_modules_that_expand_otherwise_are_refused(change: Any, reason: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny("deepseek_v3")).eval()
    change(model.model.layers[1].self_attn)
    with pytest.raises(ModelError, match=reason):
        keep_latents(model)


def test_a_rank_without_modules_that_expand_is_refused() -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES)).eval()
    model.config.kv_lora_rank = RANK
    with pytest.raises(ModelError, match="no module of it expands"):
        keep_latents(model)


def test_keys_that_are_changed_before_attention_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, tiny("deepseek_v3"))
    AttentionInterface.register(NAME, attend_paged)
    real = modeling.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*args: Any) -> Any:
        attention = real(*args)
        return lambda module, q, k, v, *rest, **more: attention(module, q, k * 2, v, *rest, **more)

    monkeypatch.setattr(modeling.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    with pytest.raises(ModelError, match="changed after they were expanded"):
        load_model(folder, "float32", torch.device("cpu"))


async def test_preempted_requests_in_a_batch_answer_as_generate_does(tmp_path: Path) -> None:
    """Chunked prompts, preemption, prefix hits."""
    model = save_model(tmp_path, tiny("deepseek_v2"))
    prompts = random_prompts([30, 28, 31])
    options = {"max_model_len": 64, "kv_cache_tokens": 104, "max_num_batched_tokens": 16}
    async with running(model, **options) as (engine, sink):
        for i, prompt in enumerate(prompts):
            engine.submit(request(str(i), prompt, greedy(33)))
        await sink.finished("0", "1", "2")
        assert engine.load().preemptions > 0
        layout = engine.spec.kv_layout
        assert layout is not None
        assert layout.token_bytes == 2 * (RANK + ROPE) * 4
    assert [sink.tokens[str(i)] for i in range(3)] == [generate(model, p, 33) for p in prompts]


def test_an_int8_engine_answers_as_its_own_weights_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny("minicpm3")).eval()
    int8_weights.quantize(model)
    int8_weights.save(model, tmp_path)
    cases = small_cases(0)
    answers = answer(tmp_path, "int8", "cpu", cases.together, cases.after, cases.exported)
    plain = int8_weights.load(tmp_path, attention="eager")
    references = [reference(plain, case) for case in cases.everything]
    assert first_difference(references, answers, tolerance=0.01) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
async def test_narrow_kv_is_bfloat16(dtype: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, tiny("deepseek_v3"))
    [prompt] = random_prompts([30])
    if dtype != "bfloat16":
        with pytest.raises(OperatorError, match="float8 is too coarse"):
            async with running(model, kv_cache_dtype=dtype):
                pass
        return
    answers = []
    for chunk in (8, 64):
        async with running(model, kv_cache_dtype=dtype, max_num_batched_tokens=chunk) as (
            engine,
            sink,
        ):
            engine.submit(request("r", prompt, greedy(6)))
            await sink.finished("r")
            answers.append(sink.tokens["r"])
    assert answers[0] == answers[1], "the answer depends on chunking"
