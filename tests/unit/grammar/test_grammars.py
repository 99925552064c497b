"""Compiled guides: what they let through, when they end, and how long they are kept."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving.errors import InvalidRequest
from serving.grammar import grammars as kept
from serving.grammar.grammars import Grammars
from serving.grammar.matcher import Matcher
from serving.protocol import Guide
from tokenizers import Tokenizer
from unit.frontend.fakes import write_tokenizer

EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("grammars"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def grammars(folder: Path) -> Grammars:
    return Grammars(folder)


def fits(grammars: Grammars, tokenizer: Tokenizer, guide: Guide, text: str) -> bool:
    """Whether `text` is one that could end there."""
    matcher = grammars.matcher(guide)
    matcher.accept(tokenizer.encode(text, add_special_tokens=False).ids)
    return not matcher.error and EOS in allowed(matcher)


def allowed(matcher: Matcher) -> list[int]:
    words = np.zeros(matcher.num_words, dtype=np.uint32)
    matcher.allow(words, [EOS], may_end=True)
    return [int(t) for t in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def schema(value: Any) -> Guide:
    return Guide("json_schema", json.dumps(value))


def tag(value: Any) -> Guide:
    return Guide("structural_tag", json.dumps(value))


PERSON = schema(
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}}
)
CALLS = {
    "structures": [
        {
            "begin": "<f>",
            "schema": {
                "type": "object",
                "properties": {"x": {"type": "integer"}},
                "required": ["x"],
                "additionalProperties": False,
            },
            "end": "</f>",
        }
    ],
    "triggers": ["<f"],
}
DIGITS = {"type": "regex", "pattern": "[0-9]+"}
TREE = {
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "const_string", "value": "<"},
            {
                "type": "or",
                "elements": [DIGITS, {"type": "tag", "begin": "b", "content": DIGITS, "end": "e"}],
            },
        ],
    }
}
TRIGGERED = {
    "format": {
        "type": "triggered_tags",
        "triggers": ["["],
        "tags": [{"begin": "[n]", "content": DIGITS, "end": ["]", ")"]}],
        "at_least_one": True,
    }
}
SEPARATED = {
    "format": {
        "type": "tags_with_separator",
        "tags": [{"begin": "(", "content": {"type": "any_text"}, "end": ")"}],
        "separator": ",",
    }
}


@pytest.mark.parametrize(
    ("guide", "text", "is_one"),
    [
        (PERSON, '{"a": 1, "b": true}', True),
        (PERSON, '{"a":1,"b":true}', False),
        (PERSON, '{"a": 1,\n  "b": true}', False),
        (schema({"type": "string", "format": "phone"}), '"x"', True),
        (Guide("grammar", 'root ::= "a" digit{2}\ndigit ::= [0-9]'), "a12", True),
        (Guide("grammar", 'root ::= "a" digit{2}\ndigit ::= [0-9]'), "a1", False),
        (tag(CALLS), "some text", True),
        (tag(CALLS), 'first <f>{"x": 1}</f> then', True),
        (tag(CALLS), 'first <f>{"x": "a"}</f> then', False),
        (tag(CALLS), "first <f>", False),
        (tag(TREE), "<12", True),
        (tag(TREE), "<b12e", True),
        (tag(TREE), "<b12", False),
        (tag(TRIGGERED), "x [n]12) y", True),
        (tag(TRIGGERED), "x", False),
        (tag(SEPARATED), "(a),(b)", True),
        (tag(SEPARATED), "(a)(b)", False),
        (tag(SEPARATED), "", True),
    ],
)
def test_text_fits_or_not(
    grammars: Grammars, tokenizer: Tokenizer, guide: Guide, text: str, is_one: bool
) -> None:
    assert fits(grammars, tokenizer, guide, text) is is_one


def test_special_tokens_of_a_tag_are_the_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    call = {"begin": "<|im_start|>", "content": DIGITS, "end": "<|im_end|>"}
    guide = tag({"format": {"type": "tag", **call}})
    matcher = grammars.matcher(guide)
    matcher.accept([tokenizer.token_to_id("<|im_start|>")])
    assert not matcher.error
    assert grammars.matcher(guide)
    assert allowed(grammars.matcher(guide)) == [tokenizer.token_to_id("<|im_start|>")]


OVERLAPPING = [
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "nick": {"type": "string"}},
        "patternProperties": {"^n": {"type": "string"}},
        "additionalProperties": additional,
    }
    for additional in (False, {"type": "integer"})
]


@pytest.mark.parametrize("value", OVERLAPPING)
def test_overlapping_properties_end_as_json_or_with_an_error(
    folder: Path, tokenizer: Tokenizer, value: Any
) -> None:
    guide = schema(value)
    for seed in range(30):
        grammars, rng = Grammars(folder), random.Random(seed)
        try:
            matcher = grammars.matcher(guide)
        except InvalidRequest:
            return
        ids: list[int] = []
        for _ in range(60):
            token = rng.choice(allowed(matcher))
            if matcher.error:
                break
            if token == EOS:
                json.loads(tokenizer.decode(ids))
                break
            ids.append(token)
            matcher.accept([token])
            if matcher.is_complete:
                assert not matcher.error
                json.loads(tokenizer.decode(ids))
                break


def test_failed_guide_is_compiled_again(folder: Path, tokenizer: Tokenizer) -> None:
    grammars = Grammars(folder)
    guide = Guide("regex", "ab+")
    matcher = grammars.matcher(guide)
    assert grammars.num_kept == 1
    matcher.accept(tokenizer.encode("x", add_special_tokens=False).ids)
    assert matcher.error
    assert not matcher.is_complete
    assert grammars.num_kept == 0
    assert fits(grammars, tokenizer, guide, "abb")


def test_guides_are_kept_by_bytes(folder: Path) -> None:
    grammars = Grammars(folder)
    size = kept.MAX_KEPT_BYTES // 3
    for i in range(5):
        grammars.matcher(Guide("grammar", f'start: "a{i}"\n//' + " " * size))
    assert grammars.num_kept == 2
