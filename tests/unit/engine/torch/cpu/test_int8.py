"""int8 engines: stored, checked, computed by the compiled kernel and without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny_model import save_tiny_model
from safetensors.torch import load_file, save_file
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest, load_manifest
from serving.engine.torch.attention import AttentionOptions, PagedStep, SequenceSpan
from serving.engine.torch.build import build_engine
from serving.engine.torch.cpu import int8_weights, packed_linear
from serving.engine.torch.cpu import kernels as cpu_kernels
from serving.engine.torch.cpu.int8_weights import Int8Embedding, Int8Linear
from serving.engine.torch.cpu.kernels import CpuKernels
from serving.engine.torch.kv.pool import KvPool
from serving.errors import ModelError
from serving.kv_layout import KvLayout
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)
from unit.engine.torch_rig import SIZES, greedy, random_prompts, request, running

WAYS = ("kernel", "fbgemm", "widened")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled kernel."""
    folder = tmp_path_factory.mktemp("kernel")
    lines: list[str] = []
    cpu_kernels.build(folder, lines.append)
    if not cpu_kernels.library(folder).exists():
        pytest.skip(lines[0])
    return folder


@pytest.fixture
def kernels(compiled: Path) -> CpuKernels:
    loaded = cpu_kernels.load(compiled)
    assert loaded is not None
    return loaded


def layer(way: str, request: pytest.FixtureRequest, *linears: Int8Linear) -> torch.nn.Module:
    """The linears as one layer, computed in one of the ways there are."""
    parent = torch.nn.Module()
    parent.gate_proj, parent.up_proj = linears if len(linears) == 2 else (linears[0], None)
    chosen = request.getfixturevalue("kernels") if way == "kernel" else None
    if way == "widened":
        request.getfixturevalue("monkeypatch").setattr(
            packed_linear, "can_pack_int8", lambda: False
        )
    elif way == "fbgemm" and not packed_linear.can_pack_int8():
        pytest.skip("no FBGEMM on this CPU")
    packed_linear.pack_linears(parent, chosen)
    joint = parent.gate_proj
    return joint.siblings.joint if isinstance(joint, packed_linear.SiblingLinear) else joint


def linear(width: int, depth: int, *, bias: bool = False, seed: int = 0) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((width, depth), generator=generator)
    offset = torch.randn(width, generator=generator) if bias else None
    return Int8Linear(*int8_weights.quantize_rows(weight), offset)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- products ----------------------------------------------------------------------------------


def test_rows_are_rounded_to_the_nearest_of_255_numbers() -> None:
    weight = torch.cat([torch.randn(6, 50), torch.zeros(1, 50)])
    rounded, scale = int8_weights.quantize_rows(weight)
    error = (rounded.float() * scale[:, None] - weight).abs()
    assert bool((error <= scale[:, None] * 0.5001).all())
    assert int(rounded.abs().max()) == 127
    assert not rounded[-1].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("num_tokens", "depth", "width"), [(1, 576, 70), (9, 50, 200), (33, 64, 30)]
)
def test_products_are_those_of_the_stored_weights(
    way: str, num_tokens: int, depth: int, width: int, request: pytest.FixtureRequest
) -> None:
    stored = linear(width, depth, bias=True)
    x = torch.randn(1, num_tokens, depth)
    x[0, -1] *= 1000  # one token's outliers must not cost the others their precision
    expected = stored(x)
    out = layer(way, request, stored)(x)
    assert out.shape == (1, num_tokens, width)
    for row in range(num_tokens):
        assert relative(out[0, row], expected[0, row]) < 1e-3


@pytest.mark.parametrize("way", ["kernel", "fbgemm"])
def test_no_row_depends_on_the_others(way: str, request: pytest.FixtureRequest) -> None:
    packed = layer(way, request, linear(67, 130))
    x = torch.randn(7, 130) * torch.logspace(-3, 3, 7)[:, None]
    together = packed(x)
    assert all(torch.equal(packed(x[i : i + 1])[0], together[i]) for i in range(7))


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_zeros_no_rows_and_strided_rows(way: str, request: pytest.FixtureRequest) -> None:
    stored = linear(40, 64, bias=True)
    bias = stored.bias
    packed = layer(way, request, stored)
    assert bias is not None
    assert torch.equal(packed(torch.zeros(3, 64)), bias.expand(3, 40))
    assert packed(torch.zeros(1, 0, 64)).shape == (1, 0, 40)
    x = torch.randn(64, 5)
    torch.testing.assert_close(packed(x.T), packed(x.T.contiguous()))


@pytest.mark.parametrize("way", ["kernel", "fbgemm"])
@pytest.mark.parametrize("depth", [576, 16400])
def test_largest_numbers_do_not_overflow(
    way: str, depth: int, request: pytest.FixtureRequest
) -> None:
    stored = Int8Linear(torch.full((5, depth), 127, dtype=torch.int8), torch.ones(5), None)
    out = layer(way, request, stored)(torch.full((6, depth), -2.5))
    torch.testing.assert_close(out, torch.full((6, 5), -2.5 * 127 * depth), rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_siblings_are_computed_as_one(way: str, request: pytest.FixtureRequest) -> None:
    first, second = linear(24, 32), linear(40, 32, seed=1)
    x = torch.randn(4, 32)
    expected = torch.cat([first(x), second(x)], dim=-1)
    assert relative(layer(way, request, first, second)(x), expected) < 5e-4


def test_kernel_uses_several_threads_and_agrees_with_one(kernels: CpuKernels) -> None:
    stored, x = linear(2000, 600), torch.randn(5, 600)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outs.append(kernels.linear(x, stored.weight, stored.scale, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)


def test_library_that_does_not_load_or_is_wrong_is_not_used(
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cpu_kernels.load(tmp_path) is None  # none was compiled
    cpu_kernels.library(tmp_path).write_bytes(b"\x7fELF")
    assert cpu_kernels.load(tmp_path) is None
    assert "do not work here" in caplog.text
    shutil.copyfile(cpu_kernels.library(compiled), cpu_kernels.library(tmp_path))
    monkeypatch.setattr(cpu_kernels, "largest_activation", lambda depth: 3.0)
    assert cpu_kernels.load(tmp_path) is None
    assert "off by" in caplog.text


def test_machine_without_a_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_kernels.build(tmp_path, lines.append)
    assert not list(tmp_path.iterdir())
    assert "apt install gcc" in lines[0] or "x86-64" in lines[0]


def test_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc1: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cpu_kernels, "_is_suitable", lambda: True)
    lines: list[str] = []
    cpu_kernels.build(tmp_path, lines.append)
    assert lines == ["no compiled kernels, decode is slower: cc1: no space left"]


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 11])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(6, 2, 64, 16), (4, 4, 16, 8), (9, 3, 80, 16)]
)
def test_attention_in_place_is_that_over_gathered_blocks(
    kernels: CpuKernels,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    window: int | None,
) -> None:
    layout = KvLayout.uniform(3, kv_heads, dim, block_size, "float32")
    ends = [70, 33, 32, 9, 1]
    # Blocks in no order, as many as each needs.
    free = torch.randperm(40, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    spans = [
        SequenceSpan([free.pop() for _ in range(layout.num_blocks(end))], end - 1, 1)
        for end in ends
    ]
    outs = []
    for given in (kernels, None):
        pool = KvPool(layout, 40, "cpu", given)
        assert (pool.kernels is None) == (given is None)
        pool.tensor.copy_(
            torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(1))
        )
        generator = torch.Generator().manual_seed(2)
        query, key, value = (
            torch.randn((count, len(ends), dim), generator=generator)
            for count in (heads, kv_heads, kv_heads)
        )
        options = AttentionOptions(dim**-0.5, window, None, None)
        step = PagedStep(pool, spans, [])
        chunked = AttentionOptions(dim**-0.5, None, None, None, chunk=16)
        outs.append(torch.cat([step.attend(1, query, key, value, o) for o in (options, chunked)]))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_attention_without_a_kernel_gathers_its_blocks(kernels: CpuKernels) -> None:
    assert KvPool(KvLayout.uniform(1, 1, 64, 8, "bfloat16"), 2, "cpu", kernels).kernels is None
    assert KvPool(KvLayout.uniform(1, 1, 20, 8, "float32"), 2, "cpu", kernels).kernels is None
    outs = []
    for given in (kernels, None):
        pool = KvPool(KvLayout.uniform(1, 2, 16, 8, "float32"), 4, "cpu", given)
        q, k, v = (torch.linspace(-2, 2, count * 16).view(count, 1, 16) for count in (4, 2, 2))
        step = PagedStep(pool, [SequenceSpan([2], 0, 1)], [])
        capped = step.attend(0, q, k, v, AttentionOptions(1.0, None, 5.0, None))
        sinking = step.attend(0, q, k, v, AttentionOptions(1.0, None, None, torch.ones(4)))
        outs.append(torch.stack([capped, sinking]))
    assert torch.equal(*outs)


# --- engines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def built(model: Path, out: Path, dtype: str = "int8") -> tuple[EngineManifest, list[str]]:
    lines: list[str] = []
    manifest = fetch_model(ModelConfig(id=str(model)), out.parent / "described", report=[].append)
    engine = EngineConfig(device="cpu", dtype=dtype)  # type: ignore[arg-type]
    return build_engine(
        manifest, out, engine=engine, fingerprint="f00d", report=lines.append
    ), lines


@pytest.fixture(scope="module")
def once(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An int8 engine, and what its build said."""
    folder = tmp_path_factory.mktemp("engines") / "int8"
    return folder, built(original, folder)[1]


@pytest.fixture(scope="module")
def int8_engine(once: tuple[Path, list[str]]) -> Path:
    return once[0]


def test_engine_is_built_and_checked_against_its_source(
    original: Path, once: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, lines = once
    engine = load_manifest(folder)
    assert (engine.dtype, engine.kv_layout and engine.kv_layout.dtype) == ("int8", "float32")
    assert engine.check.kind == "logits"
    assert 0 < engine.check.max_abs_diff < engine.check.tolerance
    assert engine.check.argmax_agreement > 0.8
    assert list(engine.weights) == ["model-int8.safetensors"]
    tensors = load_file(folder / "model-int8.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    # The head's numbers, which are tied to the embedding's, are there once.
    assert ("lm_head.weight" in tensors) != ("model.embed_tokens.weight" in tensors)
    before = sum(each.nbytes for each in load_file(original / "model.safetensors").values())
    assert sum(each.nbytes for each in tensors.values()) < 0.3 * before
    assert any("100% of the weights" in line for line in lines)
    assert any("same best token at" in line for line in lines)
    other, _ = built(original, tmp_path / "other", "float32")
    assert other.hash_salt != engine.hash_salt


def test_transformers_does_not_take_the_numbers_for_weights(int8_engine: Path) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(int8_engine)


def test_model_that_int8_cannot_hold_is_refused(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "build", lambda folder, report: None)
    model = Path(shutil.copytree(original, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        # An input that is always zero has weights beside which all others round to zero.
        if "layernorm" in name:
            weight[0] = 0.0
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            weight[:, 0] = 1000.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"differ by .* which int8 explains") as failure:
        built(model, tmp_path / "engine")
    assert "engine.dtype: float32" in failure.value.remedy
    assert not (tmp_path / "engine").exists()


async def test_engine_answers_the_same_alone_in_a_batch_and_in_chunks(int8_engine: Path) -> None:
    prompts = random_prompts([5, 40, 70, 17])
    answers: list[dict[str, list[int]]] = []
    for options in ({"max_batch_size": 1}, {"max_num_batched_tokens": 24}):
        async with running(int8_engine, dtype="int8", **options) as (engine, sink):
            assert engine.spec.kv_layout.dtype == "float32"
            for index, prompt in enumerate(prompts):
                engine.submit(request(str(index), prompt, greedy(12)))
            await sink.finished(*map(str, range(len(prompts))))
            answers.append(sink.tokens)
    assert answers[0] == answers[1]


async def test_logprobs_are_those_of_the_stored_weights(int8_engine: Path) -> None:
    """Its logprobs are those of the int8 weights computed plainly by transformers."""
    plain: Any = int8_weights.load(int8_engine)
    prompt = random_prompts([60])[0]
    async with running(int8_engine, dtype="int8") as (engine, sink):
        engine.submit(request("0", prompt, greedy(8, logprobs=1)))
        await sink.finished("0")
    tokens = sink.tokens["0"]
    with torch.inference_mode():
        logits = plain(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)[range(8), tokens]
    ours = torch.tensor([each.logprob for each in sink.logprobs["0"]])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)


def test_only_linear_layers_and_tied_embeddings_are_rounded() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        before = model(ids).logits
        assert 0.5 < int8_weights.quantize(model) < 1
        assert relative(model(ids).logits, before) < 0.05
    assert type(model.lm_head) is Int8Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    tied = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    assert int8_weights.quantize(tied) > 0.99
    assert isinstance(tied.model.embed_tokens, Int8Embedding)
    assert tied.model.embed_tokens.weight.data_ptr() == tied.lm_head.weight.data_ptr()


def test_damaged_or_foreign_weights_are_refused(int8_engine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_engine, tmp_path / "engine"))
    tensors = load_file(folder / int8_weights.FILE)
    del tensors["model.layers.1.mlp.up_proj.scale"]
    save_file(tensors, folder / int8_weights.FILE)
    with pytest.raises(ModelError, match=r"up_proj\.scale"):
        int8_weights.load(folder)
    (folder / int8_weights.FILE).write_bytes(b"half")
    with pytest.raises(ModelError, match="rebuild the engine"):
        int8_weights.load(folder)
