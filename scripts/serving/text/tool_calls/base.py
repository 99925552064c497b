"""What every tool-call format has: how its calls are parsed, and the grammar that holds them.

A format is a family's way to write calls, e.g. `<tool_call>{"name": ..., "arguments": ...}`. It
says which chat templates use it, parses generated text incrementally, and describes a call as a
grammar, for requests in which a call is required or strict.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeVar

from msgspec import Struct

from serving.grammar.lark import CallGrammar
from serving.text.parts import Arguments, Part, Reasoning, Text, ToolCall
from serving.text.reasoning import ReasoningFormat
from serving.text.scanner import SPACE, Scanner, Steps


class Tool(Struct, frozen=True):
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    name: str
    parameters: Mapping[str, Any]
    description: str = ""
    strict: bool = False


Derived = TypeVar("Derived")


class ToolSet(tuple[Tool, ...]):
    """The tools of a request, with what was made of them. Requests with the same tools share it."""

    def derive(self, key: Hashable, make: Callable[[ToolSet], Derived]) -> Derived:
        """`make(self)`, made once for each `key`. Nobody may change it."""
        made: dict[Hashable, Any] = self.__dict__.setdefault("made", {})
        if key not in made:
            made[key] = make(self)
        value: Derived = made[key]
        return value


class PartCollector:
    """Collects the parts of one answer. White space between text and a call is dropped."""

    def __init__(self, new_id: Callable[[int, str], str]) -> None:
        self._new_id = new_id
        self._space = self._thought_space = ""
        self._parts: list[Part] = []
        self.num_calls = 0
        self.is_reasoning = False
        """Set by formats: whether the text that is read is reasoning."""

    def text(self, text: str) -> None:
        """Text of the answer."""
        body = text.rstrip(SPACE)
        if not body:
            self._space += text
            return
        self._parts.append(Text(self._space + body))
        self._space = text[len(body) :]

    def reasoning(self, text: str) -> None:
        """Text that the model thinks; white space at its end is dropped."""
        body = text.rstrip(SPACE)
        if not body:
            self._thought_space += text
            return
        self._parts.append(Reasoning(self._thought_space + body))
        self._thought_space = text[len(body) :]

    def begin(self, name: str, call_id: str = "") -> None:
        """A call begins; arguments follow."""
        self._space = ""
        index = self.num_calls
        self.num_calls += 1
        self._parts.append(ToolCall(index, call_id or self._new_id(index, name), name))

    def arguments(self, text: str) -> None:
        """More arguments of the latest call."""
        if text:
            self._parts.append(Arguments(self.num_calls - 1, text))

    def finish(self) -> None:
        """The answer is complete: white space at its end counts, unless it ended with a call."""
        if self._space and not self.num_calls:
            self._parts.append(Text(self._space))
        self._space = ""

    def take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts


class ToolFormat(ABC):
    """One way to write calls. Stateless: a parser is made for each answer."""

    name: ClassVar[str]
    reasoning: ClassVar[ReasoningFormat | None] = None
    """Set by a format that parses reasoning, too: how a thought begins and ends before a call."""
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Markers that the tokenizer may hold as special tokens; detokenizing must keep them."""

    @abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a model with this chat template writes its calls so."""

    @abstractmethod
    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        """Parse one answer. What is no call is text; nothing raises."""

    @abstractmethod
    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        """The rule of a call of `tool`, added to `grammar`; returns the rule's name."""

    section: ClassVar[tuple[str, str]] = ("", "")
    """What opens and closes all calls of an answer together."""
    separator: ClassVar[str] = ""
    """What stands between two calls."""
    trigger: ClassVar[str] = ""
    """The text with which calls begin in the middle of an answer; "": calls are the whole answer."""

    def plain_answer(self, grammar: CallGrammar) -> str:
        """An expression for an answer without calls, for a format without `trigger`."""
        return grammar.rule(r"/([^\s\[{`<](?s:.*))?/")

    def new_id(self, index: int, name: str) -> str:
        """An id for a call that the model gave none."""
        return f"call_{secrets.token_hex(12)}"


def call_object(
    scanner: Scanner, out: PartCollector, accepts: Callable[[str], bool] | None = None
) -> Steps[str]:
    """Parse `{"name": ..., "arguments": {...}}`, in any order of keys, as other families name them.

    Returns the consumed text when it turns out to be no call (nothing was emitted then), else "".
    `accepts`: whether a function of this name exists; None: any does.
    """
    raw: list[str] = []
    begun, early, any_arguments = False, "", False

    def keep(text: str) -> None:
        raw.append(text)

    keep((yield from scanner.accept("{")))
    nested = 0
    while True:
        keep((yield from scanner.skip_space()))
        char = yield from scanner.accept('"', ",", "}")
        if char == "}" and nested:
            nested -= 1
            continue
        if char == "," and len(raw) > 1:
            keep(char)
            continue
        if char != '"':
            keep(char)
            break
        key, complete = yield from _rest_of_string(scanner)
        keep('"' + key + '"' * complete)
        keep((yield from scanner.skip_space()))
        colon = yield from scanner.accept(":")
        keep(colon)
        if not (colon and complete):
            break
        keep((yield from scanner.skip_space()))
        first = yield from scanner.peek()
        if key == "function" and first == "{":
            keep((yield from scanner.accept("{")))
            nested += 1
        elif key in ("name", "tool_name", "function") and first == '"' and not begun:
            value: list[str] = []
            complete = yield from scanner.json_value(value.append)
            keep("".join(value))
            name = decoded_string("".join(value)) if complete else None
            if name is None or (accepts is not None and not accepts(name)):
                break
            out.begin(name)
            begun = True
            if early:
                out.arguments(early)
        elif key in ("arguments", "parameters"):
            any_arguments = True
            if begun and first in "{[":
                yield from scanner.json_value(out.arguments)
                continue
            value = []
            complete = yield from scanner.json_value(value.append)
            text = "".join(value)
            keep(text)
            if first == '"' and complete:  # JSON inside of a JSON string
                text = decoded_string(text) or text
            text = "{}" if text == "null" else text
            if begun:
                out.arguments(text)
            else:
                early = text
        else:
            value = []
            complete = yield from scanner.json_value(value.append)
            keep("".join(value))
            if not complete:
                break
    if not begun:
        return "".join(raw)
    if not any_arguments:
        out.arguments("{}")
    return ""


def call_array(
    scanner: Scanner, out: PartCollector, accepts: Callable[[str], bool] | None = None
) -> Steps[str]:
    """Parse `[{...}, {...}]`; returns the consumed text when its beginning is no call."""
    raw = yield from scanner.accept("[")
    any_calls = False
    while True:
        raw += yield from scanner.skip_space()
        char = yield from scanner.peek()
        if char == "{":
            no_call = yield from call_object(scanner, out, accepts)
            if no_call and not any_calls:
                return raw + no_call
            any_calls = any_calls or not no_call
        elif char == ",":
            yield from scanner.accept(",")
        else:
            raw += yield from scanner.accept("]")
            return "" if any_calls else raw


def decoded_string(text: str) -> str | None:
    """The value of a JSON string; None when it is none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _rest_of_string(scanner: Scanner) -> Steps[tuple[str, bool]]:
    """A key, after its opening quote. Keys with escapes do not occur in calls."""
    text: list[str] = []
    end = yield from scanner.until(['"'], text.append)
    return "".join(text), bool(end)
