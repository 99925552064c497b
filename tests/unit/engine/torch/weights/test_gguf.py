"""From a GGUF file to an engine, with a tiny one written here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest
from serving.engine.torch.build import build_engine
from serving.errors import ModelError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
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
    assert manifest["kv_layout"]["num_kv_heads"] == KV_HEADS
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


@pytest.mark.parametrize(("pre", "architecture"), [("llama-bpe", "llama"), ("gpt-2", "gemma3")])
def test_tokenizer_that_does_not_convert_exactly_is_refused(
    tmp_path: Path, pre: str, architecture: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", pre=pre, architecture=architecture)
    with pytest.raises(ModelError, match="cannot be converted exactly"):
        build(path, tmp_path)


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged"):
        build(path, tmp_path)


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}


@pytest.mark.parametrize(
    ("metadata", "lost"),
    [
        (YARN, r"rope\.scaling\.type: yarn"),
        (LINEAR, r"rope\.scaling\.type: linear"),
        ({"llama.attention.sliding_window": 2047}, "sliding_window: 2047"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
    ],
)
def test_metadata_that_would_be_dropped_is_refused(
    metadata: dict[str, float | str], lost: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=lost) as failure:
        build(path, tmp_path)
    assert "safetensors" in failure.value.remedy


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
def test_tensors_for_rotary_positions_that_would_be_dropped_are_refused(
    name: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tensors=[name])
    with pytest.raises(ModelError, match=name):
        build(path, tmp_path)


def test_metadata_that_changes_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    neutral: dict[str, float | str] = {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 1.0,
        "llama.attention.sliding_window": 0,
    }
    build(write_gguf(tmp_path / "tiny.gguf", metadata=neutral), tmp_path)
