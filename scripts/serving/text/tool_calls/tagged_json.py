"""Formats that put `{"name": ..., "arguments": {...}}` between two markers, alone or in a list."""

from __future__ import annotations

import json
from collections.abc import Mapping

from serving.grammar.lark import CallGrammar
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat, call_array, call_object


class TaggedJson(ToolFormat):
    """`begin` JSON `end`. With `is_list`, one list holds all calls of an answer."""

    def __init__(
        self,
        name: str,
        begin: str,
        end: str,
        *,
        is_list: bool = False,
        line_breaks: bool = False,
        name_key: str = "name",
        arguments_key: str = "arguments",
        never: tuple[str, ...] = (),
    ) -> None:
        """`line_breaks`: the JSON stands on lines of its own. `never`: what a template that uses
        this format does not contain."""
        self.name = name  # type: ignore[misc]
        self._begin, self._end, self._is_list = begin, end, is_list
        self._break = "\n" if line_breaks else ""
        self._name_key, self._arguments_key = name_key, arguments_key
        self._never = never
        self.special_tokens = tuple(m for m in (begin, end) if m)  # type: ignore[misc]
        self.trigger = begin  # type: ignore[misc]
        if is_list:
            self.section = (f"{begin}{self._break}[", f"]{self._break}{end}")  # type: ignore[misc]
            self.separator = ", "  # type: ignore[misc]
        else:
            self.separator = "\n" if line_breaks else ""  # type: ignore[misc]

    def fits(self, template: str) -> bool:
        return self._begin in template and not any(text in template for text in self._never)

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        while True:
            marker = yield from scanner.until([self._begin], out.text)
            if not marker:
                return
            space = yield from scanner.skip_space()
            first = yield from scanner.peek()
            if first == "{":
                no_call = yield from call_object(scanner, out)
            elif first == "[":
                no_call = yield from call_array(scanner, out)
            else:
                no_call = " "
            if no_call:
                out.text(self._begin + space + no_call.rstrip())
                continue
            # More calls may follow between the same markers, with or without a comma.
            while True:
                yield from scanner.skip_space()
                yield from scanner.accept(",", ";")
                yield from scanner.skip_space()
                if (yield from scanner.peek()) != "{":
                    break
                yield from call_object(scanner, out)
            if self._end:
                yield from scanner.accept(self._end)

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        opening = json.dumps({self._name_key: tool.name}, ensure_ascii=False)[:-1]
        opening += f', "{self._arguments_key}": '
        arguments = grammar.json(tool.parameters)
        if self._is_list:
            return grammar.rule(f"{grammar.literal(opening)} {arguments} {grammar.literal('}')}")
        begin = grammar.literal(self._begin + self._break + opening)
        return grammar.rule(f"{begin} {arguments} {grammar.literal('}' + self._break + self._end)}")


HERMES = TaggedJson(
    "hermes",
    "<tool_call>",
    "</tool_call>",
    line_breaks=True,
    never=("<function=", "<arg_key>", "<minimax:tool_call>", "<seed:tool_call>"),
)
"""Hermes, Qwen 2.5 and 3, QwQ, SmolLM3, Granite 4."""

GRANITE = TaggedJson("granite", "<|tool_call|>", "", is_list=True, never=("<|/tool_call|>",))
"""Granite 3."""

PHI4 = TaggedJson("phi4_mini", "<|tool_call|>", "<|/tool_call|>", is_list=True)
"""Phi-4-mini."""

NEMOTRON = TaggedJson("nemotron", "<TOOLCALL>", "</TOOLCALL>", is_list=True)
"""Nemotron Nano v2, Llama Nemotron."""

MINIMAX_M1 = TaggedJson(
    "minimax_m1", "<tool_calls>", "</tool_calls>", line_breaks=True, never=("```json",)
)
"""MiniMax-M1 (a line a call) and Jamba (a list)."""

COHERE = TaggedJson(
    "cohere",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    is_list=True,
    name_key="tool_name",
    arguments_key="parameters",
)
"""Command R7B and Command A."""

FORMATS = (HERMES, PHI4, GRANITE, NEMOTRON, MINIMAX_M1, COHERE)
