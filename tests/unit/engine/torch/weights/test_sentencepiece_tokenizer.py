"""A model whose only tokenizer is a SentencePiece model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving.engine.torch.weights.source import save_tokenizer
from serving.errors import ModelError
from tokenizers import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Prefill and decode run in separate workers; blocks travel between them.",
    "def add(a, b): return a + b # 1234567890",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return path


def save(folder: Path, target: Path) -> Tokenizer:
    target.mkdir()
    save_tokenizer(folder, target)
    return Tokenizer.from_file(str(target / "tokenizer.json"))


def test_it_becomes_a_tokenizer_json_with_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    ours = save(folder, tmp_path / "engine")
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (*CORPUS, "日本 🙂"):
        assert ours.encode(text, add_special_tokens=False).ids == original.encode(text)
        assert ours.decode(original.encode(text)) == text


def test_file_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes it
    with pytest.raises(ModelError, match="no SentencePiece model") as failure:
        save(folder, tmp_path / "engine")
    assert "tokenizer.json" in failure.value.remedy


def test_conversion_that_differs_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").unlink()  # so that transformers makes a plain one of it
    with pytest.raises(ModelError, match="cannot be converted"):
        save(folder, tmp_path / "engine")
