"""A guide applies to the answer, and not to what the model thinks before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from serving.grammar.grammars import Grammars
from serving.protocol import Guide
from serving.text.reasoning import BY_NAME
from serving.text.tool_calls.guide import after_reasoning
from tokenizers import Tokenizer
from unit.frontend.fakes import write_tokenizer

EOS = 1
TAG = {"format": {"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": ">"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("thinking"))


@pytest.mark.parametrize(
    ("guide", "answer", "other"),
    [
        (Guide("json_schema", '{"type": "boolean"}'), "true", "1"),
        (Guide("json_schema", '{"type": "string", "format": "phone"}'), '"1"', "1"),
        (Guide("json_schema", '{"properties": {"a": {}}}'), '{"a": 1}', '{"a":1}'),
        (Guide("regex", "a/b|c\n"), "a/b", "a"),
        (Guide("grammar", 'start: "{" B\nB: "}"'), "{}", "{"),
        (Guide("grammar", 'root ::= "a" [0-9]'), "a1", "aa"),
        (Guide("structural_tag", json.dumps(TAG)), "<x>", "<x"),
    ],
)
@pytest.mark.parametrize("thought", ["<think>or not: 1 {</think>\n\n", ""])
def test_answer_is_guided_and_thinking_is_free(
    folder: Path, guide: Guide, answer: str, other: str, thought: str
) -> None:
    grammars = Grammars(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lark = after_reasoning(guide, {}, BY_NAME["think"], inside=False)

    def fits(text: str) -> bool:
        matcher = grammars.matcher(Guide("grammar", lark))
        matcher.accept(tokenizer.encode(text, add_special_tokens=False).ids)
        words = np.zeros(matcher.num_words, dtype=np.uint32)
        matcher.allow(words, [EOS], may_end=True)
        return not matcher.error and bool(words[0] >> np.uint32(EOS) & np.uint32(1))

    assert fits(thought + answer)
    assert not fits(thought + other)
