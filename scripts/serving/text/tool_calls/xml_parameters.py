"""Formats that write each parameter between tags: Qwen3-Coder, GLM, MiniMax M2, DeepSeek V3.2.

A value is text, and the tool's schema says whether that is a string or JSON. Strings become JSON
strings as they arrive; other values when they are complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from serving.grammar.lark import CallGrammar
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat


class XmlParameters(ToolFormat):
    """PartCollector of the form: call_begin NAME name_end (parameter_begin KEY key_end VALUE value_end)* call_end."""

    call_begin: ClassVar[str]
    name_end: ClassVar[str]
    parameter_begin: ClassVar[str]
    key_end: ClassVar[str]
    value_end: ClassVar[str]
    call_end: ClassVar[str]
    outer: ClassVar[tuple[str, str]] = ("", "")
    """Tags around calls that carry no meaning of their own."""
    line_breaks: ClassVar[bool] = True
    """A value stands on lines of its own."""

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        outer = [tag for tag in self.outer if tag]
        while True:
            marker = yield from scanner.until([*outer, self.call_begin], out.text)
            if not marker:
                return
            if marker != self.call_begin:
                # White space after a tag belongs to the format, and so does what precedes it.
                yield from scanner.skip_space()
                continue
            held: list[str] = []
            stop = yield from scanner.until(self.name_stops(), held.append)
            name = self.clean_name("".join(held))
            if not stop or not name:
                out.text(marker + "".join(held) + stop)
                continue
            out.begin(name)
            yield from self._parameters(scanner, out, tools.get(name), stop)

    def name_stops(self) -> list[str]:
        return [self.name_end]

    def clean_name(self, text: str) -> str:
        return text.strip().strip('"')

    def _parameters(
        self, scanner: Scanner, out: PartCollector, tool: Tool | None, stop: str
    ) -> Steps[None]:
        properties = _properties(tool)
        separator = "{"
        while stop != self.call_end:
            if stop != self.parameter_begin:
                stop = yield from scanner.until([self.parameter_begin, self.call_end], _drop)
            if stop != self.parameter_begin:
                break
            held: list[str] = []
            key_end = yield from scanner.until([self.key_end, self.call_end], held.append)
            if key_end != self.key_end:
                break
            key, says_string = self.key("".join(held))
            out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            is_string = says_string
            if is_string is None:
                is_string = _is_string(properties.get(key))
            yield from self._value(scanner, out, is_string)
            stop = ""
        out.arguments("{}" if separator == "{" else "}")

    def key(self, text: str) -> tuple[str, bool | None]:
        """(parameter's name, whether the tag says that its value is a string)."""
        return text.strip().strip('"'), None

    def _value(self, scanner: Scanner, out: PartCollector, is_string: bool) -> Steps[None]:
        """One value up to its end tag, without the line breaks that enclose it."""
        if self.line_breaks:
            yield from scanner.accept("\n")
        if not is_string:
            held: list[str] = []
            yield from scanner.until([self.value_end], held.append)
            out.arguments(_as_json("".join(held).strip()))
            return
        out.arguments('"')
        pending = ""  # a line break that may be the last one

        def emit(text: str) -> None:
            nonlocal pending
            text = pending + text
            pending = "\n" if self.line_breaks and text.endswith("\n") else ""
            text = text.removesuffix(pending) if pending else text
            out.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        yield from scanner.until([self.value_end], emit)
        out.arguments('"')

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        schema = tool.parameters
        required = set(schema.get("required") or ())
        parts = [grammar.literal(self.opening(tool.name))]
        for key, value in _properties(tool).items():
            parameter = grammar.rule(self._parameter_rule(grammar, key, value, schema))
            parts.append(parameter if key in required else f"{parameter}?")
        parts.append(grammar.literal(self.closing()))
        return grammar.rule(" ".join(part for part in parts if part))

    def _parameter_rule(
        self, grammar: CallGrammar, key: str, value: Any, schema: Mapping[str, Any]
    ) -> str:
        is_string = _is_string(value)
        opening = grammar.literal(self.parameter_opening(key, is_string))
        closing = self.parameter_closing()
        if is_string and isinstance(value, dict) and "enum" in value:
            texts = [str(each) for each in value["enum"]]
            options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return f"{opening} ({options}) {grammar.literal(closing)}"
        if is_string:
            return f"{opening} {grammar.text_before(closing)}"
        definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        typed = {**value, **definitions} if isinstance(value, dict) else {}
        return f"{opening} {grammar.json(typed)} {grammar.literal(closing)}"

    def opening(self, name: str) -> str:
        return f"{self.outer[0]}\n{self.call_begin}{name}{self.name_end}\n"

    def closing(self) -> str:
        return f"{self.call_end}\n{self.outer[1]}"

    def parameter_opening(self, key: str, is_string: bool) -> str:
        return f"{self.parameter_begin}{key}{self.key_end}\n"

    def parameter_closing(self) -> str:
        return f"\n{self.value_end}\n"


class Qwen3Coder(XmlParameters):
    """Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5."""

    name = "qwen3_coder"
    outer = ("<tool_call>", "</tool_call>")
    trigger = "<tool_call>"
    call_begin, name_end, call_end = "<function=", ">", "</function>"
    parameter_begin, key_end, value_end = "<parameter=", ">", "</parameter>"
    separator = "\n"
    special_tokens = outer

    def fits(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template and not _is_seed(template)


class SeedOss(Qwen3Coder):
    """Seed-OSS: the same with another outer tag."""

    name = "seed_oss"
    outer = ("<seed:tool_call>", "</seed:tool_call>")
    trigger = "<seed:tool_call>"
    special_tokens = outer

    def fits(self, template: str) -> bool:
        return _is_seed(template)


class Glm(XmlParameters):
    """GLM 4.5 to 4.7: the name stands bare, and a key and its value have a tag each."""

    name = "glm"
    trigger = "<tool_call>"
    call_begin, name_end, call_end = "<tool_call>", "\n", "</tool_call>"
    parameter_begin, key_end, value_end = "<arg_key>", "</arg_key>", "</arg_value>"
    line_breaks = False
    separator = "\n"
    special_tokens = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )

    def fits(self, template: str) -> bool:
        return "<arg_key>" in template

    def name_stops(self) -> list[str]:
        return ["\n", self.parameter_begin, self.call_end]

    def _value(self, scanner: Scanner, out: PartCollector, is_string: bool) -> Steps[None]:
        yield from scanner.skip_space()
        yield from scanner.accept("<arg_value>")
        yield from super()._value(scanner, out, is_string)

    def opening(self, name: str) -> str:
        return f"<tool_call>{name}\n"

    def closing(self) -> str:
        return "</tool_call>"

    def parameter_opening(self, key: str, is_string: bool) -> str:
        return f"<arg_key>{key}</arg_key>\n<arg_value>"

    def parameter_closing(self) -> str:
        return "</arg_value>\n"


class MiniMaxM2(XmlParameters):
    """MiniMax M2: quoted names."""

    name = "minimax_m2"
    outer = ("<minimax:tool_call>", "</minimax:tool_call>")
    trigger = "<minimax:tool_call>"
    call_begin, name_end, call_end = '<invoke name="', '">', "</invoke>"
    parameter_begin, key_end, value_end = '<parameter name="', '">', "</parameter>"
    separator = "\n"
    special_tokens = outer

    def fits(self, template: str) -> bool:
        return "<minimax:tool_call>" in template

    def parameter_opening(self, key: str, is_string: bool) -> str:
        return f"{self.parameter_begin}{key}{self.key_end}"

    def parameter_closing(self) -> str:
        return f"{self.value_end}\n"


class DeepSeekV32(XmlParameters):
    """DeepSeek V3.2: the tag of a parameter says whether its value is a string."""

    name = "deepseek_v32"
    outer = ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>")
    trigger = "<｜DSML｜function_calls>"
    call_begin, name_end, call_end = '<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>"
    parameter_begin, key_end = '<｜DSML｜parameter name="', ">"
    value_end = "</｜DSML｜parameter>"
    line_breaks = False
    separator = "\n"
    special_tokens = ("｜DSML｜",)

    def fits(self, template: str) -> bool:
        return "｜DSML｜" in template

    def key(self, text: str) -> tuple[str, bool | None]:
        name, _, rest = text.partition('"')
        return name, "true" in rest if "string=" in rest else None

    def parameter_opening(self, key: str, is_string: bool) -> str:
        return f'{self.parameter_begin}{key}" string="{str(is_string).lower()}">'

    def parameter_closing(self) -> str:
        return f"{self.value_end}\n"


def _is_seed(template: str) -> bool:
    return "<seed:tool_call>" in template


def _properties(tool: Tool | None) -> Mapping[str, Any]:
    found = tool.parameters.get("properties") if tool is not None else None
    return found if isinstance(found, Mapping) else {}


def _is_string(schema: Any) -> bool:
    """Whether text is meant. Without a type it is, unless the schema leaves other types open."""
    if not isinstance(schema, Mapping):
        return True
    kind = schema.get("type")
    if kind is not None:
        return kind == "string" or (isinstance(kind, list) and set(kind) <= {"string", "null"})
    if "enum" in schema:
        return all(isinstance(value, str) for value in schema["enum"])
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return all(_is_string(option) for option in options if option != {"type": "null"})
    return "$ref" not in schema


def _as_json(text: str) -> str:
    """`text` if it is JSON, else as a JSON string; Python's words for constants are understood."""
    constants = {"True": "true", "False": "false", "None": "null"}
    text = constants.get(text, text)
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text


def _drop(text: str) -> None:
    pass


FORMATS = (DeepSeekV32(), MiniMaxM2(), SeedOss(), Glm(), Qwen3Coder())
