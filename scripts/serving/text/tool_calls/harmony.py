"""gpt-oss: messages on channels. `analysis` is reasoning, `final` the answer, calls name a recipient.

Format: https://cookbook.openai.com/articles/openai-harmony. `openai-harmony` parses token ids of
its own vocabulary only, which it downloads; this reads text, and takes what a model got wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from serving.grammar.lark import CallGrammar
from serving.text.reasoning import ReasoningFormat
from serving.text.scanner import Scanner, Steps
from serving.text.tool_calls.base import PartCollector, Tool, ToolFormat

_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")


class Harmony(ToolFormat):
    """Reads reasoning, too: the channels make no difference between the two."""

    name = "harmony"
    reasoning = ReasoningFormat(
        "harmony",
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant",
        answer_header="<|channel|>final<|message|>",
    )
    special_tokens = (
        *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"),
        *("<|end|>", "<|call|>", "<|return|>"),
    )

    def fits(self, template: str) -> bool:
        return "<|channel|>" in template and "<|start|>" in template

    def parse(self, scanner: Scanner, out: PartCollector, tools: Mapping[str, Tool]) -> Steps[None]:
        # The prompt ends with `<|start|>assistant`: a header follows, or text of a careless model.
        header: list[str] = []
        first = yield from scanner.peek()
        if first and first != "<" and not first.isspace():
            yield from self._message(scanner, out, "final")
        while not scanner.at_end:
            stop = yield from scanner.until(["<|message|>", "<|end|>"], header.append)
            if stop == "<|message|>":
                yield from self._message(scanner, out, "".join(header))
            elif not stop and not header:
                return
            header.clear()
            if not scanner.at_end and (yield from scanner.peek()) == "":
                return

    def _message(self, scanner: Scanner, out: PartCollector, header: str) -> Steps[None]:
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            out.begin(recipient.group(1))
            any_text = False

            def emit(text: str) -> None:
                nonlocal any_text
                any_text = True
                out.arguments(text)

            yield from scanner.until(_ENDS, emit)
            if not any_text:
                out.arguments("{}")
        elif "analysis" in header:
            out.is_reasoning = True
            yield from scanner.until(_ENDS, out.reasoning)
            out.is_reasoning = False
        else:  # `final`, and a preamble on `commentary`, are for the reader
            yield from scanner.until(_ENDS, out.text)

    def plain_answer(self, grammar: CallGrammar) -> str:
        return f"{grammar.literal('<|channel|>final<|message|>')} {grammar.rule('/(?s:.*)/')}"

    def describe(self, grammar: CallGrammar, tool: Tool) -> str:
        opening = f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>"
        arguments = grammar.json(tool.parameters)
        return grammar.rule(f"{grammar.literal(opening)} {arguments} {grammar.literal('<|call|>')}")


FORMATS = (Harmony(),)
