"""Formats that write calls as Python: `[f(a=1, b="x"), g()]`."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from serving.grammar.lark import CallGrammar, comma_separated
from serving.text.scanner import SPACE, Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "a": "\a", "v": "\v"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_CONSTANTS = {"true": True, "false": False, "null": None}


class Pythonic(ToolFormat):
    """PartCollector in a list between two markers, or as the whole answer when there are none."""

    def __init__(
        self,
        name: str,
        begin: str,
        end: str,
        *,
        is_list: bool = True,
        families: tuple[str, ...] = (),
    ) -> None:
        """`is_list`: calls stand in one Python list, else one a line. `families`: a template with
        one of these texts uses the format."""
        self.name = name  # type: ignore[misc]
        self._begin, self._end, self._is_list = begin, end, is_list
        self._families = families or (begin,)
        self.trigger = begin  # type: ignore[misc]
        self.special_tokens = tuple(m for m in (begin, end) if m)  # type: ignore[misc]
        self.section = (begin + "[" * is_list, "]" * is_list + end)  # type: ignore[misc]
        self.separator = ", " if is_list else "\n"  # type: ignore[misc]

    def fits(self, template: str) -> bool:
        return any(text in template for text in self._families)

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        if self._begin:
            while (yield from scanner.until([self._begin], out.text)):
                yield from scanner.skip_space()
                raw = yield from scanner.accept("[")
                no_call = yield from self._calls(scanner, out, None)
                if no_call:
                    out.text(self._begin + raw + no_call)
                yield from scanner.skip_space()
                yield from scanner.accept(self._end)
            return
        space = yield from scanner.skip_space()
        raw = yield from scanner.accept("[")
        if raw:
            raw += yield from self._calls(scanner, out, tools)
        if not out.num_calls:
            out.text(space + raw)
        while not scanner.at_end:
            out.text(scanner.take_all())
            if not scanner.at_end:
                yield

    def _calls(
        self, scanner: Scanner, out: PartCollector, known: Mapping[str, Tool] | None
    ) -> Steps[str]:
        """Parse calls to the end of the list; returns the text consumed when the first is none."""
        first = True
        while True:
            space = yield from scanner.skip_space()
            name = yield from scanner.take_while(lambda char: char.isalnum() or char in "_.-")
            paren = yield from scanner.accept("(")
            if not (name and paren) or (known is not None and name not in known):
                yield from scanner.accept("]")
                return space + name + paren if first else ""
            first = False
            out.begin(name)
            yield from self._arguments(scanner, out)
            yield from scanner.skip_space()
            yield from scanner.accept(",")

    def _arguments(self, scanner: Scanner, out: PartCollector) -> Steps[None]:
        separator = "{"
        while True:
            yield from scanner.skip_space()
            key = yield from scanner.take_while(lambda char: char not in "=,)" + SPACE)
            yield from scanner.skip_space()
            if (yield from scanner.accept("=")) and key:
                yield from scanner.skip_space()
                out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
                separator = ", "
                yield from _value(scanner, out)
                yield from scanner.skip_space()
            if not (yield from scanner.accept(",")):
                yield from scanner.accept(")")
                out.arguments("{}" if separator == "{" else "}")
                return

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        properties: Mapping[str, Any] = tool.parameters.get("properties") or {}
        required = set(tool.parameters.get("required") or ())
        definitions = {
            k: tool.parameters[k] for k in ("$defs", "definitions") if k in tool.parameters
        }
        pairs = []
        for key, value in properties.items():
            schema = {**value, **definitions} if isinstance(value, dict) else {}
            # JSON's constants are read like Python's, so a value may be JSON.
            pairs.append((key in required, f"{grammar.literal(key + '=')} {grammar.json(schema)}"))
        arguments = comma_separated(grammar, pairs, ", ")
        return grammar.rule(
            f"{grammar.literal(tool.name + '(')} {arguments} {grammar.literal(')')}"
        )


def _value(scanner: Scanner, out: PartCollector) -> Steps[None]:
    quote = yield from scanner.accept('"""', "'''", '"', "'")
    if quote:
        yield from _string(scanner, out, quote)
        return
    text = yield from _until_separator(scanner)
    out.arguments(_as_json(text.strip()))


def _string(scanner: Scanner, out: PartCollector, quote: str) -> Steps[None]:
    """A Python string, as a JSON string while it arrives."""

    def emit(text: str) -> None:
        out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    out.arguments('"')
    while (yield from scanner.until([quote, "\\"], emit)) == "\\":
        char = yield from scanner.peek()
        yield from scanner.accept(char or " ")
        if char in _HEX_DIGITS:
            size = _HEX_DIGITS[char]
            digits = yield from scanner.peek(size)
            try:
                emit(chr(int(digits, 16)))
            except ValueError:
                emit("\\" + char)
                continue
            yield from scanner.accept(digits)
        else:
            emit(_ESCAPES.get(char, char if char in "\\'\"\n" else "\\" + char))
    out.arguments('"')


def _until_separator(scanner: Scanner) -> Steps[str]:
    """A Python value up to the comma or bracket that follows it."""
    depth, quote, escaped = 0, "", False

    def goes_on(char: str) -> bool:
        nonlocal depth, quote, escaped
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
            return True
        if depth == 0 and char in ",)":
            return False
        if char in "\"'":
            quote = char
        depth += (char in "([{") - (char in ")]}")
        return True

    return (yield from scanner.take_while(goes_on))


def _as_json(text: str) -> str:
    """A Python literal or JSON as JSON; anything else as a JSON string."""
    if text in _CONSTANTS:
        return text
    for read in (ast.literal_eval, json.loads):
        try:
            return json.dumps(read(text), ensure_ascii=False)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return json.dumps(text, ensure_ascii=False)


FORMATS = (
    Pythonic("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
    Pythonic("llama4_pythonic", "<|python_start|>", "<|python_end|>"),
    Pythonic("olmo3", "<function_calls>", "</function_calls>", is_list=False),
    Pythonic("pythonic", "", "", families=("[func_name1(", "func_name(params")),
)
