"""Writes grammars in llguidance's Lark: literals, special tokens, JSON by schema.

Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. A special token cannot
be spelled by other tokens, so it is named by its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.grammar.schema import tight_schema

ANY_TEXT = "(?s:.*)"
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class CallGrammar:
    """Collects rules. `special_tokens` maps the tokenizer's special tokens to their ids."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special = special_tokens
        self._rules: list[str] = []
        names = sorted(special_tokens, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names))) if names else None

    def rule(self, expression: str, attributes: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {expression}")
        return name

    def literal(self, text: str) -> str:
        """An expression for exactly `text`; special tokens in it by their ids."""
        if not text:
            return ""
        if self._split is None:
            return json.dumps(text, ensure_ascii=False)
        pieces, start = [], 0
        for match in self._split.finditer(text):
            if match.start() > start:
                pieces.append(json.dumps(text[start : match.start()], ensure_ascii=False))
            pieces.append(f"<[{self._special[match.group()]}]>")
            start = match.end()
        if start < len(text):
            pieces.append(json.dumps(text[start:], ensure_ascii=False))
        return " ".join(pieces)

    def is_special(self, text: str) -> bool:
        return text in self._special

    def json(self, schema: Mapping[str, Any]) -> str:
        """A rule for JSON of `schema`."""
        return self.rule(json_expression(schema or ANY_OBJECT))

    def text_before(self, end: str) -> str:
        """An expression for any text up to and including the first `end`."""
        special = self._split.search(end) if self._split else None
        if special is None:
            return self.rule(f"/{ANY_TEXT}/", f"[suffix={json.dumps(end, ensure_ascii=False)}]")
        # A special token ends a lexeme by itself, so what precedes the token is part of the text.
        text = self.rule(f"/{ANY_TEXT}{_as_regex(end[: special.start()])}/")
        return f"{text} {self.literal(end[special.start() :])}"

    def text_until_opened(self, trigger: str) -> str:
        """A rule for text that may go on for ever, or open a call by `trigger`, its end."""
        special = self._split.search(trigger) if self._split else None
        if special is None:
            return self.rule(f"TEXT {self.literal(trigger)}", "[lazy]")
        return self.rule(
            self.text_before(trigger) if special.start() else f"TEXT {self.literal(trigger)}"
        )

    def lark(self, start: str) -> str:
        """The whole grammar; `start` is the expression of the start rule."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"


def json_expression(schema: Any) -> str:
    """An expression for JSON of `schema`, in one style."""
    return "%json " + json.dumps(tight_schema(schema), ensure_ascii=False)


def regex_expression(regex: str) -> str:
    """An expression for what matches `regex` as a whole, which may contain slashes."""
    escaped = re.sub(r"(\\.)|/|\n", _escaped_for_slashes, regex, flags=re.DOTALL)
    return f"/{escaped}/"


def _escaped_for_slashes(match: re.Match[str]) -> str:
    found = match.group()
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found, found)


def alternatives(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({' | '.join(names)})"


def comma_separated(grammar: CallGrammar, pairs: Sequence[tuple[bool, str]], comma: str) -> str:
    """An expression for pairs in this order, with commas only between them.

    Each is (whether it must be there, its expression).
    """
    between = json.dumps(comma)
    following = ""  # what may come after a pair that was written
    leading = ""  # the same where none was written yet
    for needed, pair in reversed(pairs):
        tail = f"{between} {pair} {following}"
        head = f"{pair} {following}"
        if needed:
            following, leading = grammar.rule(tail), grammar.rule(head)
        else:
            skip_following = f" | {following}" if following else ' | ""'
            skip_leading = f" | {leading}" if leading else ' | ""'
            following, leading = (
                grammar.rule(tail + skip_following),
                grammar.rule(head + skip_leading),
            )
    return leading


def _as_regex(text: str) -> str:
    """An expression that matches exactly `text`, for use between slashes."""
    return re.sub(r"[\\.^$*+?{}\[\]|()/]", r"\\\g<0>", text)
