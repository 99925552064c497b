"""From a GGUF file to an engine, with a tiny one written here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest
from serving.engine.torch.build import build_engine
from serving.engine.torch.weights.context import model_max_len
from serving.engine.torch.weights.source import Source
from serving.errors import ModelError
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from unit.engine.gguf_file import KV_HEADS, TEMPLATE, write_gguf


def build(path: Path, out: Path) -> EngineManifest:
    manifest = fetch_model(ModelConfig(id=str(path)), out / "model", report=[].append)
    engine = EngineConfig(device="cpu", dtype="float32")
    return build_engine(manifest, out / "engine", engine=engine, fingerprint="f", report=[].append)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    built = build(write_gguf(folder / "tiny.gguf"), folder)
    assert built.check.kind == "logits"
    return folder / "engine"


def test_the_engine_computes_the_same_as_the_gguf_file(out: Path) -> None:
    manifest = json.loads((out / "engine.json").read_text())
    assert manifest["check"]["max_abs_diff"] == 0.0
    assert manifest["check"]["argmax_agreement"] == 1.0
    assert manifest["kv_layout"]["groups"][0]["num_kv_heads"] == KV_HEADS
    assert manifest["model_max_len"] == 4096


def test_special_tokens_are_the_files_own(out: Path) -> None:
    manifest = json.loads((out / "engine.json").read_text())
    assert (manifest["eos_token_ids"], manifest["pad_token_id"]) == ([2], 2)
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert loaded.chat_template == TEMPLATE


def test_digits_are_split_from_the_space_before_them(out: Path) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("hell  42").tokens == ["hell", "ĠĠ", "4", "2"]


@pytest.mark.parametrize("text", ["hello ▁ world", "日本 🙂", "a .b", "  two\n\nlines "])
def test_text_survives_encoding_and_decoding(out: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged"):
        build(path, tmp_path)


SCALED = "llama.rope.scaling"


@pytest.mark.parametrize(
    ("metadata", "lost"),
    [
        ({f"{SCALED}.type": "yarn", f"{SCALED}.factor": 4.0}, "without an original context length"),
        ({f"{SCALED}.type": "su", f"{SCALED}.original_context_length": 64}, "scaling.type: su"),
        (
            {
                f"{SCALED}.type": "yarn",
                f"{SCALED}.original_context_length": 64,
                f"{SCALED}.yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor",
        ),
        ({"llama.attention.sliding_window": 2047}, "sliding_window: 2047"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.expert_count": 8}, "expert_count: 8"),
        ({"llama.attention.value_length": 8}, "keys and values of different sizes"),
        ({"llama.rope.dimension_count": 8}, "positions in 8 of 16 dimensions"),
    ],
)
def test_metadata_that_would_be_dropped_is_refused(
    metadata: dict[str, float | str], lost: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=lost) as failure:
        build(path, tmp_path)
    assert "safetensors" in failure.value.remedy


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("rope_factors_long.weight", "rope_factors_long.weight"),
        ("blk.0.attn_q.bias", "attn_q.bias"),
        ("blk.1.ffn_norm_2.weight", "ffn_norm_2"),
    ],
)
def test_tensors_that_would_be_dropped_are_refused(name: str, lost: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tensors={name: [1.0] * 8})
    with pytest.raises(ModelError, match=lost):
        build(path, tmp_path)


@pytest.mark.parametrize("architecture", ["gemma", "falcon", "gemma4", "qwen35", "starcoder2"])
def test_an_architecture_that_was_not_compared_is_refused_by_its_name(
    architecture: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", architecture=architecture)
    with pytest.raises(ModelError, match=f"`{architecture}`, which this project does not read"):
        build(path, tmp_path)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(path: Path) -> dict[str, Any]:
    manifest = fetch_model(ModelConfig(id=str(path)), path.parent / "model", report=[].append)
    config: dict[str, Any] = Source(manifest).config.to_dict()
    return config


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        (
            {f"{SCALED}.type": "linear", f"{SCALED}.factor": 2.0},
            {"rope_type": "linear", "factor": 2},
        ),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4}),
        (
            {
                f"{SCALED}.type": "yarn",
                f"{SCALED}.factor": 4.0,
                f"{SCALED}.original_context_length": 1024,
                f"{SCALED}.yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 1024,
                "beta_fast": 16,
                "beta_slow": 1,
                "attention_factor": 0.1 * math.log(4) + 1,
            },
        ),
    ],
)
def test_scaled_positions_are_transformers_own(
    metadata: dict[str, float | str], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = read(write_gguf(tmp_path / "tiny.gguf", metadata=metadata))
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | expected


def llama3_factors() -> list[float]:
    """What the published formula divides the eight frequencies of this file by."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors: list[float] = (plain / scaled).tolist()
    return factors


def test_llama_3_factors_become_llama_3_parameters(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": llama3_factors()}
    config = read(write_gguf(tmp_path / "tiny.gguf", tensors=tensors))
    assert config["rope_parameters"] == pytest.approx(LLAMA3)


def test_other_factors_are_used_as_they_are_at_every_length(tmp_path: Path) -> None:
    factors = [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    path = write_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": factors})
    config = LlamaConfig(**read(path))
    frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies, plain / torch.tensor(factors))
    assert (scale, model_max_len(config)) == (1.0, 4096)


def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 0}
    built = build(write_gguf(tmp_path / "tiny.gguf", metadata=metadata), tmp_path)
    assert built.eos_token_ids == [2, 0]


def test_metadata_that_changes_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    neutral: dict[str, float | str] = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.attention.sliding_window": 0,
    }
    build(write_gguf(tmp_path / "tiny.gguf", metadata=neutral), tmp_path)
