"""Formats whose calls are bare JSON: Llama 3, and models whose template knows no tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.grammar.lark import CallGrammar
from serving.text.json_text import json_text
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat, call_array, call_object


class PlainJson(ToolFormat):
    """An answer that is one JSON object, several of them, or a list. All else is text."""

    name = "json"
    arguments_key = "arguments"
    separator = "\n"

    def fits(self, template: str) -> bool:
        return False  # what is left when no format fits

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        space = yield from scanner.skip_space()
        fence = yield from scanner.accept("```json", "```")
        space += fence
        space += yield from scanner.skip_space()
        no_call = yield from self._next(scanner, out, tools)
        if no_call is not None:
            out.text(space + no_call)
            yield from _rest(scanner, out)
            return
        while not scanner.at_end:
            yield from scanner.skip_space()
            yield from scanner.accept(";", ",")
            yield from scanner.skip_space()
            no_call = yield from self._next(scanner, out, tools)
            if no_call is not None:
                yield from scanner.accept("```")
                out.text(no_call)
                yield from _rest(scanner, out)
                return

    def _next(
        self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]
    ) -> Steps[str | None]:
        """None after a call; the text that is none otherwise."""
        first = yield from scanner.peek()
        accepts = tools.__contains__
        if first == "{":
            return (yield from call_object(scanner, out, accepts)) or None
        if first == "[":
            return (yield from call_array(scanner, out, accepts)) or None
        return ""

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        opening = json.dumps({"name": tool.name}, ensure_ascii=False)[:-1]
        opening += f', "{self.arguments_key}": '
        arguments = grammar.json(tool.parameters)
        return grammar.rule(f"{grammar.literal(opening)} {arguments} {grammar.literal('}')}")


class Llama3Json(PlainJson):
    """`{"name": ..., "parameters": {...}}`, several separated by `;`, perhaps after a special token."""

    name = "llama3_json"
    arguments_key = "parameters"
    separator = "; "
    special_tokens = ("<|python_tag|>",)

    def fits(self, template: str) -> bool:
        llama = "<|start_header_id|>" in template or "<|header_start|>" in template
        return llama and "tools" in template and '"parameters": ' in template

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        yield from scanner.skip_space()
        yield from scanner.accept("<|python_tag|>")
        yield from super().parse(scanner, out, tools)


def _rest(scanner: Scanner, out: PartCollector) -> Steps[None]:
    while True:
        out.text(scanner.take_all())
        if scanner.at_end:
            return
        yield


def preamble(tools: Sequence[Tool]) -> str:
    """System text that explains tools to a model whose chat template knows none."""
    listed: list[dict[str, Any]] = [
        {
            "name": tool.name,
            **({"description": tool.description} if tool.description else {}),
            "parameters": tool.parameters,
        }
        for tool in tools
    ]
    return (
        "You can call these functions. They are described as JSON:\n"
        + json_text(listed)
        + "\nTo call a function, answer with nothing but one JSON object a call:\n"
        '{"name": FUNCTION_NAME, "arguments": {ARGUMENT_NAME: VALUE}}\n'
        "The result of a call follows in the next message. Answer in plain text when no function "
        "is needed."
    )


FORMATS = (Llama3Json(),)
FALLBACK = PlainJson()
