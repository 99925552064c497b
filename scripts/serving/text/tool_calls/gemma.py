"""Gemma 4 and FunctionGemma: `call:NAME{KEY:VALUE,...}`, strings between markers of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serving.grammar.lark import CallGrammar, comma_separated
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat


class GemmaCall(ToolFormat):
    """Keys are bare, `quote` encloses strings, and all else is written like JSON."""

    def __init__(self, name: str, begin: str, end: str, quote: str) -> None:
        self.name = name  # type: ignore[misc]
        self._begin, self._end, self._quote = begin, end, quote
        self.trigger = begin  # type: ignore[misc]
        self.special_tokens = (begin, end, quote)  # type: ignore[misc]

    def fits(self, template: str) -> bool:
        return self._begin in template

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        while True:
            marker = yield from scanner.until([self._begin], out.text)
            if not marker:
                return
            yield from scanner.skip_space()
            prefix = yield from scanner.accept("call:")
            name = yield from scanner.take_while(lambda char: char.isalnum() or char in "_.-")
            brace = yield from scanner.accept("{")
            if not (prefix and name and brace):
                out.text(marker + prefix + name + brace)
                continue
            out.begin(name)
            yield from self._object(scanner, out)
            yield from scanner.until([self._end], _drop)

    def _object(self, scanner: Scanner, out: PartCollector) -> Steps[None]:
        """The pairs of an object whose brace was consumed, as JSON."""
        out.arguments("{")
        separator = ""
        while True:
            yield from scanner.skip_space()
            if (yield from scanner.accept("}")) or scanner.at_end:
                break
            if (yield from scanner.accept(",")):
                continue
            key = yield from self._key(scanner)
            if not (yield from scanner.accept(":")):
                break
            out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            yield from self._value(scanner, out)
        out.arguments("}")

    def _key(self, scanner: Scanner) -> Steps[str]:
        if (yield from scanner.accept(self._quote)):
            held: list[str] = []
            yield from scanner.until([self._quote], held.append)
            return "".join(held)
        key = yield from scanner.take_while(lambda char: char not in ":,}")
        return key.strip().strip('"')

    def _value(self, scanner: Scanner, out: PartCollector) -> Steps[None]:
        yield from scanner.skip_space()
        begin = yield from scanner.accept(self._quote, "{", "[")
        if begin == self._quote:
            out.arguments('"')
            yield from scanner.until(
                [self._quote],
                lambda text: out.arguments(json.dumps(text, ensure_ascii=False)[1:-1]),
            )
            out.arguments('"')
        elif begin == "{":
            yield from self._object(scanner, out)
        elif begin == "[":
            yield from self._list(scanner, out)
        else:
            text = yield from scanner.take_while(lambda char: char not in ",]}")
            out.arguments(_scalar(text.strip()))

    def _list(self, scanner: Scanner, out: PartCollector) -> Steps[None]:
        out.arguments("[")
        separator = ""
        while True:
            yield from scanner.skip_space()
            if (yield from scanner.accept("]")) or scanner.at_end:
                break
            if (yield from scanner.accept(",")):
                continue
            if (yield from scanner.peek()) == "}":  # unbalanced
                break
            out.arguments(separator)
            separator = ", "
            yield from self._value(scanner, out)
        out.arguments("]")

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        opening = grammar.literal(f"{self._begin}call:{tool.name}")
        arguments = self._object_rule(grammar, tool.parameters)
        return grammar.rule(f"{opening} {arguments} {grammar.literal(self._end)}")

    def _rule(self, grammar: CallGrammar, schema: Any) -> str:
        """The rule of a value of `schema`; what this notation cannot hold precisely is any value."""
        schema = schema if isinstance(schema, Mapping) else {}
        quote = self._quote
        if "enum" in schema:
            options = [
                grammar.literal(
                    f"{quote}{each}{quote}" if isinstance(each, str) else json.dumps(each)
                )
                for each in schema["enum"]
            ]
            return grammar.rule(" | ".join(options))
        if schema.get("type") == "string":
            return grammar.rule(f"{grammar.literal(quote)} {grammar.text_before(quote)}")
        if schema.get("type") == "object":
            return self._object_rule(grammar, schema)
        if schema.get("type") == "array":
            item = self._rule(grammar, schema.get("items"))
            return grammar.rule(f'"[" ({item} ("," {item})*)? "]"')
        if schema.get("type") in ("integer", "number", "boolean", "null"):
            return grammar.json({key: schema[key] for key in schema if key != "description"})
        return self._any(grammar)

    def _object_rule(self, grammar: CallGrammar, schema: Mapping[str, Any]) -> str:
        """An object with the properties of `schema`, or with any where it names none."""
        properties: Mapping[str, Any] = schema.get("properties") or {}
        if properties:
            required = set(schema.get("required") or ())
            pairs = [
                (key in required, f"{grammar.literal(key + ':')} {self._rule(grammar, value)}")
                for key, value in properties.items()
            ]
            return grammar.rule(f'"{{" {comma_separated(grammar, pairs, ",")} "}}"')
        if schema.get("additionalProperties") is False:
            return grammar.rule('"{" "}"')
        pair = f'/[A-Za-z0-9_]+/ ":" {self._any(grammar)}'
        return grammar.rule(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def _any(self, grammar: CallGrammar) -> str:
        text = grammar.rule(f"{grammar.literal(self._quote)} {grammar.text_before(self._quote)}")
        number = grammar.json({"type": ["number", "boolean", "null"]})
        return grammar.rule(f"{text} | {number}")


def _scalar(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text


def _drop(text: str) -> None:
    pass


FORMATS = (
    GemmaCall("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
    GemmaCall("function_gemma", "<start_function_call>", "<end_function_call>", "<escape>"),
)
