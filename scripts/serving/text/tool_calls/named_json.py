"""Formats that write a function's name between markers, and its arguments as JSON behind it."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from typing import ClassVar

from serving.grammar.lark import CallGrammar
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat, call_array, call_object


class Mistral(ToolFormat):
    """`[TOOL_CALLS]name[ARGS]{...}` (since tokenizer v11), or `[TOOL_CALLS][{"name": ...}]`."""

    name = "mistral"
    special_tokens = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    trigger = "[TOOL_CALLS]"

    def __init__(self, name: str, *, has_args: bool) -> None:
        self.name = name  # type: ignore[misc]
        self._has_args = has_args
        if not has_args:
            self.section = ("[TOOL_CALLS][", "]")  # type: ignore[misc]
            self.separator = ", "  # type: ignore[misc]

    def fits(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template and ("[ARGS]" in template) == self._has_args

    def new_id(self, index: int, name: str) -> str:
        """Mistral's templates take ids of nine letters and digits only."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        while True:
            marker = yield from scanner.until(["[TOOL_CALLS]"], out.text)
            if not marker:
                return
            yield from scanner.skip_space()
            first = yield from scanner.peek()
            if first == "[":
                no_call = yield from call_array(scanner, out)
            elif first == "{":
                no_call = yield from call_object(scanner, out)
            else:
                no_call = yield from self._named(scanner, out)
            if no_call:
                out.text(marker + no_call)

    def _named(self, scanner: Scanner, out: PartCollector) -> Steps[str]:
        name = yield from scanner.take_while(lambda char: char not in "[{")
        call_id = yield from scanner.accept("[CALL_ID]")
        if call_id:
            call_id = yield from scanner.take_while(lambda char: char not in "[{")
        args = yield from scanner.accept("[ARGS]")
        yield from scanner.skip_space()
        if (yield from scanner.peek()) != "{" or not name.strip():
            return name + args
        out.begin(name.strip(), call_id.strip())
        yield from scanner.json_value(out.arguments)
        return ""

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        arguments = grammar.json(tool.parameters)
        if self._has_args:
            return grammar.rule(f"{grammar.literal(f'[TOOL_CALLS]{tool.name}[ARGS]')} {arguments}")
        opening = grammar.literal(f'{{"name": "{tool.name}", "arguments": ')
        return grammar.rule(f"{opening} {arguments} {grammar.literal('}')}")


class Sectioned(ToolFormat):
    """PartCollector between `call_begin` and `call_end`, all of them in one section.

    `before_name` and `after_name` enclose the name. `fence` is a Markdown fence around the JSON.
    """

    call_begin: ClassVar[str]
    call_end: ClassVar[str]
    before_name: ClassVar[str] = ""
    after_name: ClassVar[str]
    fence: ClassVar[tuple[str, str]] = ("", "")

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        opening, closing = (marker.strip() for marker in self.section)
        while True:
            marker = yield from scanner.until(
                [text for text in (opening, closing, self.call_begin) if text], out.text
            )
            if not marker:
                return
            if marker != self.call_begin:
                yield from scanner.skip_space()
                continue
            yield from scanner.skip_space()
            if self.before_name:
                yield from scanner.accept(self.before_name)
            held: list[str] = []
            stop = yield from scanner.until([self.after_name, self.call_end], held.append)
            name, call_id = self.named("".join(held).strip())
            if stop != self.after_name or not name:
                out.text(marker + "".join(held))
                continue
            out.begin(name, call_id)
            yield from scanner.skip_space()
            yield from scanner.accept("```json")
            yield from scanner.skip_space()
            if (yield from scanner.peek()) == "{":
                yield from scanner.json_value(out.arguments)
            else:
                out.arguments("{}")
            yield from scanner.until([self.call_end], _drop)

    def named(self, header: str) -> tuple[str, str]:
        """(name, id) from what stands before `after_name`."""
        return header, ""

    def header(self, tool: Tool) -> str:
        return f"{self.before_name}{tool.name}"

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        opening = f"{self.call_begin}{self.header(tool)}{self.after_name}{self.fence[0]}"
        arguments = grammar.json(tool.parameters)
        closing = grammar.literal(f"{self.fence[1]}{self.call_end}")
        return grammar.rule(f"{grammar.literal(opening)} {arguments} {closing}")


class DeepSeekV3(Sectioned):
    """DeepSeek V3 and R1: the JSON is fenced."""

    name = "deepseek_v3"
    section = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    trigger = "<｜tool▁calls▁begin｜>"
    call_begin, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    before_name, after_name = "function<｜tool▁sep｜>", "\n"
    fence = ("```json\n", "\n```")
    separator = "\n"
    special_tokens = (*section, call_begin, call_end, "<｜tool▁sep｜>")

    def fits(self, template: str) -> bool:
        return "<｜tool▁sep｜>" in template and "```json" in template


class DeepSeekV31(Sectioned):
    """DeepSeek V3.1: name, separator, JSON."""

    name = "deepseek_v31"
    section = DeepSeekV3.section
    trigger = DeepSeekV3.trigger
    call_begin, call_end = DeepSeekV3.call_begin, DeepSeekV3.call_end
    after_name = "<｜tool▁sep｜>"
    special_tokens = DeepSeekV3.special_tokens

    def fits(self, template: str) -> bool:
        return "<｜tool▁sep｜>" in template and "```json" not in template


class KimiK2(Sectioned):
    """Kimi K2: the header is an id, `functions.NAME:INDEX`, which histories repeat."""

    name = "kimi_k2"
    section = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    trigger = "<|tool_calls_section_begin|>"
    call_begin, call_end = "<|tool_call_begin|>", "<|tool_call_end|>"
    after_name = "<|tool_call_argument_begin|>"
    special_tokens = (*section, call_begin, call_end, after_name)

    def fits(self, template: str) -> bool:
        return "<|tool_calls_section_begin|>" in template

    def named(self, header: str) -> tuple[str, str]:
        name, _, index = header.removeprefix("functions.").rpartition(":")
        return (name, header) if name and index.isdigit() else (header, "")

    def new_id(self, index: int, name: str) -> str:
        return f"functions.{name}:{index}"

    def header(self, tool: Tool) -> str:
        return f"functions.{tool.name}:0"


class LlamaFunctionTag(Sectioned):
    """`<function=name>{...}</function>`, Llama 3.1's own format and Functionary's."""

    name = "llama_function_tag"
    trigger = "<function="
    call_begin, call_end, after_name = "<function=", "</function>", ">"

    def fits(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" not in template


def _drop(text: str) -> None:
    pass


FORMATS = (
    Mistral("mistral", has_args=True),
    Mistral("mistral_v3", has_args=False),
    DeepSeekV3(),
    DeepSeekV31(),
    KimiK2(),
    LlamaFunctionTag(),
)
