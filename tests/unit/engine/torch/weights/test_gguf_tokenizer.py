"""Tokenizers of GGUF files against the tokenizer.json that they were made of.

Originals are trained here, with the words that the named models' tokenizer.json files cut.
`tests/benchmarks/gguf_tokenizers.py` compares real ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.engine.torch.weights import gguf_tokenizer
from serving.errors import ModelError
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from unit.engine.gguf_vocabulary import write_vocabulary
from unit.engine.hard_texts import HARD_TEXTS

_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
NFC = {"type": "NFC"}


def words(*patterns: str) -> dict[str, Any]:
    splits = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _BYTES | {"use_regex": False}]}


ORIGINALS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (_BYTES | {"use_regex": True}, None, False),
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                _BYTES | {"use_regex": True},
            ],
        },
        None,
        False,
    ),
    "llama-bpe": (words(rf"{_WORD}|\p{{N}}{{1,3}}{_END}"), None, True),
    "qwen2": (words(rf"{_WORD}|\p{{N}}{_END}"), NFC, False),
    "qwen35": (
        words(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        NFC,
        False,
    ),
    "gpt-4o": (
        words(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}" + _CASED_END
        ),
        None,
        True,
    ),
    "tekken": (
        words(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}" + _CASED_END
        ),
        None,
        True,
    ),
}
"""By GGUF's name: the pre-tokenizer and the normalizer of tokenizer.json, and `ignore_merges`."""


def trained(name: str) -> dict[str, Any]:
    """A tokenizer.json with special tokens, and an added one that is not special."""
    cut, normalizer, ignore_merges = ORIGINALS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(HARD_TEXTS * 3, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content |= {"pre_tokenizer": cut, "normalizer": normalizer, "decoder": _BYTES}
    content["model"]["ignore_merges"] = ignore_merges
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    start = len(content["model"]["vocab"])
    content["added_tokens"] = [
        {"id": start, "content": "<|begin|>", "special": True, **plain},
        {"id": start + 1, "content": "<|end|>", "special": True, **plain},
        {"id": start + 2, "content": "<think>", "special": False, **plain},
    ]
    return content


def converted(path: Path, max_len: int = 64) -> Tokenizer:
    target = path.with_suffix("")
    target.mkdir()
    gguf_tokenizer.save(path, target, max_len)
    return Tokenizer.from_file(str(target / "tokenizer.json"))


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    content = trained(name)
    original = Tokenizer.from_str(json.dumps(content))
    path = write_vocabulary(tmp_path / "a.gguf", content, metadata={"pre": name})
    found = converted(path)
    special = ("a<|begin|>\n\n<|end|> b", "<think>\n x</think>")
    for text in (*HARD_TEXTS, *special):
        expected = original.encode(text, add_special_tokens=False)
        assert found.encode(text, add_special_tokens=False).tokens == expected.tokens
        assert found.encode(text, add_special_tokens=False).ids == expected.ids
        assert found.decode(expected.ids) == original.decode(expected.ids)


def test_the_originals_differ_on_these_texts() -> None:
    seen = []
    for name in ORIGINALS:
        tokenizer = Tokenizer.from_str(json.dumps(trained(name)))
        seen.append([tokenizer.encode(text).tokens for text in HARD_TEXTS])
    assert all(tokens not in seen[:index] for index, tokens in enumerate(seen))


@pytest.mark.parametrize(
    ("name", "stated", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
    ],
)
def test_bos_comes_first_where_the_model_wants_it(
    name: str, stated: dict[str, bool], begins: bool, tmp_path: Path
) -> None:
    content = trained(name)
    bos = content["added_tokens"][0]["id"]
    facts = {"pre": name, "bos_token_id": bos, **stated}
    found = converted(write_vocabulary(tmp_path / "a.gguf", content, metadata=facts))
    assert (found.encode("Hello").ids[0] == bos) is begins


# --- SentencePiece --------------------------------------------------------------------------------


def pieces(prefix: bool) -> dict[str, Any]:
    """A tokenizer.json as those of Llama 2 and, without `prefix`, of Gemma."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator([text.replace(" ", "▁") for text in HARD_TEXTS[:8]], trainer)
    learned = json.loads(learner.to_str())["model"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    characters = [token for token in learned["vocab"] if len(token) == 1]
    runs = ["\n\n", "\n\n\n", "▁▁", "▁▁▁"]
    listed = [*runs, *characters, *("".join(merge) for merge in learned["merges"])]
    tokens = list(dict.fromkeys(["<unk>", "<s>", "</s>", *byte_pieces, *listed]))
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in (*reversed(runs), *("".join(merge) for merge in learned["merges"]))
        for at in range(1, len(token))
        if {token[:at], token[at:]} <= set(ids)
    ]
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = [("<unk>", True), ("<s>", True), ("</s>", True), *((run, False) for run in runs)]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": ids[name], "content": name, "special": special, **plain}
            for name, special in added
            if name in ids
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if prefix
        else replace,
        "decoder": {"type": "Sequence", "decoders": [*decoders, *([strip] if prefix else [])]},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": list(dict.fromkeys(merges)),
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_and_scores_give_the_ids_of_the_original(prefix: bool, tmp_path: Path) -> None:
    content = pieces(prefix)
    original = Tokenizer.from_str(json.dumps(content))
    path = write_vocabulary(
        tmp_path / "a.gguf",
        content,
        model="llama",
        metadata={"bos_token_id": 1, "unknown_token_id": 0, "add_space_prefix": prefix},
    )
    found = converted(path)
    for text in (*HARD_TEXTS, "<s>a</s> b", "x</s>\n\ny"):
        expected = original.encode(text)
        assert found.encode(text, add_special_tokens=False).tokens == expected.tokens
        assert found.encode(text).ids == [1, *expected.ids]
        assert found.decode(expected.ids) == original.decode(expected.ids)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "model", "pre", "reason"),
    [
        ("llama", "gpt2", "no-such-words", "tokenizer.ggml.pre: no-such-words"),
        ("llama", "gpt2", "dbrx", "tokenizer.ggml.pre: dbrx"),
        ("llama", "gpt2", None, "does not say `tokenizer.ggml.pre`"),
        ("phi3", "gpt2", "gpt-4o", "gpt-4o, of a Phi model"),
        ("llama", "t5", None, "tokenizer.ggml.model: t5"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused_by_its_name(
    architecture: str, model: str, pre: str | None, reason: str
) -> None:
    metadata = {"general.architecture": architecture, "tokenizer.ggml.model": model}
    if pre:
        metadata["tokenizer.ggml.pre"] = pre
    with pytest.raises(ModelError, match=reason) as failure:
        gguf_tokenizer.require_exact(metadata)
    assert "safetensors" in failure.value.remedy


def test_a_token_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    content = trained("gpt-2")
    content["model"]["vocab"]["<|end|>"] = len(content["model"]["vocab"]) + 5
    path = write_vocabulary(tmp_path / "a.gguf", content, metadata={"pre": "gpt-2"})
    with pytest.raises(ModelError, match="twice"):
        converted(path)
