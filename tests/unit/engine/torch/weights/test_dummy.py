"""Engines without weights: from a config alone to tokens, the same ones on every worker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny_model import save_tiny_model
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import DummyWeights, EngineManifest, load_manifest, load_model
from serving.engine.torch.build import build_engine
from serving.engine.torch.weights import dummy as dummy_weights
from serving.errors import ConfigError, ModelError
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING
from unit.engine.gguf_file import write_gguf
from unit.engine.latent_models import FAMILIES
from unit.engine.torch_rig import greedy, request, running

PROMPT = list(range(5, 45))
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 320 tokens, and no model."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    return folder


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A folder with nothing but config.json."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def build(
    model: Path, out: Path, tokenizer: Path | None = None, lines: list[str] | None = None
) -> EngineManifest:
    said: list[str] = [] if lines is None else lines
    config = ModelConfig(id=str(model), tokenizer=None if tokenizer is None else str(tokenizer))
    fetched = fetch_model(config, out / "model", weights="dummy", report=said.append)
    engine = EngineConfig(device="cpu", dtype="float32", weights="dummy")
    return build_engine(fetched, out / "engine", engine=engine, fingerprint="f", report=said.append)


async def tokens_of(engine_dir: Path, dtype: str = "float32") -> list[int]:
    async with running(engine_dir, dtype=dtype) as (engine, sink):
        engine.submit(request("a", PROMPT, greedy(12)))
        await sink.finished("a")
    return sink.tokens["a"]


def test_config_and_a_lent_tokenizer_make_an_engine_without_weights(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    built = build(shape, tmp_path, tokenizer, lines)
    assert load_manifest(tmp_path / "engine") == built
    assert (built.weights, built.check.kind) == ({}, "none")
    assert built.dummy_weights is not None
    files = {path.name for path in (tmp_path / "engine").iterdir()}
    assert {"config.json", "tokenizer.json", "engine.json"} <= files
    assert not [name for name in files if "safetensors" in name]
    assert built.kv_layout is not None
    assert built.kv_layout.block_shape == (2, 2, 16, 2, 16)
    assert any("answers are noise" in line for line in lines)


async def test_experts_and_latents_make_an_engine(tokenizer: Path, tmp_path: Path) -> None:
    config = CONFIG_MAPPING["deepseek_v3"](**{**FAMILIES["deepseek_v3"], "vocab_size": 384})
    config.save_pretrained(tmp_path / "shape")
    built = build(tmp_path / "shape", tmp_path, tokenizer)
    assert built.kv_layout is not None
    assert built.kv_layout.num_planes == 1
    assert len(await tokens_of(tmp_path / "engine")) == 12


def test_the_manifest_counts_the_weights_of_the_model(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    built = build(shape, tmp_path, tokenizer)
    cpu = torch.device("cpu")
    model = dummy_weights.make_model(tmp_path / "engine", 0, cpu, torch.bfloat16, attention="eager")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert built.dummy_weights == DummyWeights(dummy_weights.SEED, total)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_two_workers_have_the_same_weights(
    dtype: str, shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    build(shape, tmp_path, tokenizer)
    torch.manual_seed(1)
    first = await tokens_of(tmp_path / "engine", dtype)
    torch.manual_seed(2)
    assert await tokens_of(tmp_path / "engine", dtype) == first


def test_seed_decides_the_weights_and_other_randomness_is_left_alone(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    build(shape, tmp_path, tokenizer)

    def weights(seed: int) -> torch.Tensor:
        model: Any = dummy_weights.make_model(
            tmp_path / "engine", seed, torch.device("cpu"), torch.float32, attention="eager"
        )
        return model.model.layers[1].mlp.down_proj.weight.detach()

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = weights(0)
    assert torch.rand(1) == expected
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert 0.015 < float(first.std()) < 0.025


def test_every_token_the_model_can_sample_has_a_text(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    build(shape, tmp_path, tokenizer)
    ours = Tokenizer.from_file(str(tmp_path / "engine" / "tokenizer.json"))
    lent = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert ours.get_vocab_size() == SHAPE["vocab_size"]
    assert all(ours.decode([token]) == f" ~{token}" for token in range(320, 384))
    sentence = "Prefill and decode run in separate workers; 321 ~330."
    assert ours.encode(sentence).ids == lent.encode(sentence).ids


def test_tokenizer_beyond_the_models_vocabulary_is_refused(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (shape / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 256}))
    with pytest.raises(ModelError, match=r"320 tokens, config\.json says `vocab_size` 256"):
        build(shape, tmp_path, tokenizer)


def test_models_own_tokenizer_is_used_when_it_has_one(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer, shape, dirs_exist_ok=True)
    (shape / "model.safetensors").write_bytes(b"not looked at")
    build(shape, tmp_path)
    described = load_model(tmp_path / "model" / "model.json")
    assert (described.format, described.tokenizer) == ("config", None)
    assert "model.safetensors" not in {file.path for file in described.files}


async def test_gguf_file_gives_its_shape_and_its_tokenizer(shape: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf")
    built = build(gguf, tmp_path / "whole")
    assert (built.dummy_weights is not None, built.eos_token_ids) == (True, [2])
    assert len(await tokens_of(tmp_path / "whole" / "engine")) == 12
    build(shape, tmp_path / "lent", gguf)
    ours = Tokenizer.from_file(str(tmp_path / "lent" / "engine" / "tokenizer.json"))
    assert ours.decode(ours.encode("hello 12").ids) == "hello 12"


def test_changed_shape_gives_other_block_hashes(
    shape: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = build(shape, tmp_path / "before", tokenizer)
    (shape / "config.json").write_text(json.dumps(SHAPE | {"intermediate_size": 64}))
    after = build(shape, tmp_path / "after", tokenizer)
    assert before.hash_salt != after.hash_salt


def test_missing_tokenizer_is_asked_for(shape: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Before anything is written; what the remedy says to set is enough."""
    with pytest.raises(ModelError, match=rf"{shape} has no tokenizer\.json\n") as failure:
        build(shape, tmp_path)
    assert "`model.tokenizer: bundled`" in failure.value.remedy
    assert "to a folder or `.gguf` file that has one" in failure.value.remedy
    assert not (tmp_path / "model" / "model.json").exists()
    assert not (tmp_path / "engine").exists()
    build(shape, tmp_path, tokenizer)


def test_a_missing_tokenizer_is_reported_with_its_key(shape: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as failure:
        build(shape, tmp_path, tmp_path / "nowhere")
    assert failure.value.key == "model.tokenizer"


def test_config_alone_is_refused_as_real_weights(shape: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors") as failure:
        fetch_model(ModelConfig(id=str(shape)), tmp_path / "model", report=[].append)
    assert "`engine.weights: dummy`" in failure.value.remedy
