"""Structural tags: text that is free until a trigger, and then has a prescribed form.

Both forms that clients send are read: `structures` with `triggers`, and the tree of `format`.
Reference: https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import InvalidRequest
from serving.grammar.lark import (
    ANY_TEXT,
    CallGrammar,
    alternatives,
    json_expression,
    regex_expression,
)

_MAX_DEPTH = 32


def structural_tag_grammar(tag: Any, special_tokens: Mapping[str, int]) -> str:
    """The grammar, in Lark. Raises InvalidRequest for what is no structural tag."""
    if not isinstance(tag, Mapping):
        raise _wrong("it must be an object")
    reader = _Reader(special_tokens)
    if "format" in tag:
        return reader.lark(reader.read(tag["format"], 0))
    structures = [
        {
            "begin": _text(each, "begin"),
            "content": {"type": "json_schema", "json_schema": _member(each, "schema")},
            "end": _text(each, "end"),
        }
        for each in _items(tag, "structures")
    ]
    return reader.lark(reader.triggered(_items(tag, "triggers"), structures, 0))


class _Reader:
    """Turns a format into an expression, and collects the rules that it needs."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._grammar = CallGrammar(special_tokens)

    def lark(self, start: str) -> str:
        return self._grammar.lark(start) + f"TEXT: /{ANY_TEXT}/\n"

    def read(self, format: Any, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise _wrong("it is nested too deeply")
        grammar, deeper = self._grammar, depth + 1
        match _member(format, "type"):
            case "const_string":
                return grammar.literal(_text(format, "value")) or '""'
            case "json_schema":
                return grammar.rule(json_expression(_member(format, "json_schema")))
            case "regex":
                return grammar.rule(regex_expression(_text(format, "pattern")))
            case "grammar":
                return grammar.rule(f"%lark {{\n{_text(format, 'grammar')}\n}}")
            case "any_text":
                return grammar.rule("TEXT")
            case "sequence":
                parts = [self.read(each, deeper) for each in _items(format, "elements")]
                return f"({' '.join(parts)})"
            case "or":
                return alternatives(
                    [self.read(each, deeper) for each in _items(format, "elements")]
                )
            case "tag":
                return self._tag(format, "", deeper)
            case "triggered_tags":
                at_least_one = bool(format.get("at_least_one"))
                stop_after_first = bool(format.get("stop_after_first"))
                return self.triggered(
                    _items(format, "triggers"),
                    _items(format, "tags"),
                    deeper,
                    at_least_one=at_least_one,
                    stop_after_first=stop_after_first,
                )
            case "tags_with_separator":
                return self._separated(format, deeper)
        raise _wrong(f"`{str(format['type'])[:50]}` is not supported")

    def triggered(
        self,
        triggers: Sequence[Any],
        tags: Sequence[Any],
        depth: int,
        *,
        at_least_one: bool = False,
        stop_after_first: bool = False,
    ) -> str:
        """Free text in which each trigger begins one of the tags."""
        opened = []
        for trigger in triggers:
            if not isinstance(trigger, str) or not trigger:
                raise _wrong("a trigger must be a text")
            followers = [
                self._tag(tag, trigger, depth)
                for tag in tags
                if _text(tag, "begin").startswith(trigger)
            ]
            if followers:
                # In the same rule, because text that opened a tag must go on with it.
                until = self._grammar.text_until_opened(trigger)
                opened.append(self._grammar.rule(f"{until} {alternatives(followers)}"))
        if any(not _text(tag, "begin").startswith(tuple(triggers)) for tag in tags) or not opened:
            raise _wrong("each `begin` must start with one of the triggers")
        once = alternatives(opened)
        if stop_after_first:
            return once if at_least_one else f"({once} | TEXT)"
        return f"({once}){'+' if at_least_one else '*'} TEXT"

    def _tag(self, tag: Any, trigger: str, depth: int) -> str:
        """A tag as a rule, less the trigger, which was consumed."""
        content, end = _member(tag, "content"), _ends(tag)
        begin = self._grammar.literal(_text(tag, "begin").removeprefix(trigger))
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(end):
            body = alternatives([self._grammar.text_before(each) for each in end])
        else:
            closing = alternatives([self._grammar.literal(each) or '""' for each in end])
            body = f"{self.read(content, depth + 1)} {closing}"
        return self._grammar.rule(f"{begin} {body}")

    def _separated(self, format: Any, depth: int) -> str:
        tag = alternatives([self._tag(each, "", depth) for each in _items(format, "tags")])
        separator = self._grammar.literal(_text(format, "separator"))
        more = "" if format.get("stop_after_first") else f"({separator} {tag})*"
        return f"({tag} {more})" + ("" if format.get("at_least_one") else "?")


def _ends(tag: Any) -> list[str]:
    end = _member(tag, "end")
    ends = end if isinstance(end, list) else [end]
    if not ends or not all(isinstance(each, str) for each in ends):
        raise _wrong("`end` must be a text")
    return ends


def _member(value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong("an object is missing")
    if key not in value:
        raise _wrong(f"`{key}` is missing")
    return value[key]


def _text(value: Any, key: str) -> str:
    found = _member(value, key)
    if not isinstance(found, str):
        raise _wrong(f"`{key}` must be a text")
    return found


def _items(value: Any, key: str) -> list[Any]:
    found = _member(value, key)
    if not isinstance(found, list) or not found:
        raise _wrong(f"`{key}` must be a list that is not empty")
    return found


def _wrong(why: str) -> InvalidRequest:
    return InvalidRequest(f"The structural tag cannot be used: {why}", code="invalid_grammar")
