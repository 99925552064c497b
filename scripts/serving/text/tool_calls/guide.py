"""Grammars for answers that hold tool calls, where a call is required or strict.

Without them a model may call as it likes, and its parser takes what comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from serving.grammar.ebnf import as_lark
from serving.grammar.lark import (
    ANY_TEXT,
    CallGrammar,
    alternatives,
    json_expression,
    regex_expression,
)
from serving.grammar.structural_tags import structural_tag_grammar
from serving.protocol import Guide
from serving.text.reasoning import ReasoningFormat
from serving.text.tool_calls.base import Tool, ToolFormat

MAX_CALLS = 32
"""Calls of one answer that a grammar lets pass: a weak model would repeat itself to the length limit."""


def required_calls(
    format: ToolFormat,
    tools: Sequence[Tool],
    special_tokens: Mapping[str, int],
    *,
    parallel: bool,
    reasoning: ReasoningFormat | None = None,
    inside_reasoning: bool = False,
) -> str:
    """An answer that is one call of one of `tools`, or with `parallel` one or more.

    The model may think before it, if it has a format for `reasoning`.
    """
    grammar = CallGrammar(special_tokens)
    calls = _calls(grammar, format, tools, parallel=parallel)
    return grammar.lark(_join(_thinking(grammar, reasoning, inside_reasoning), calls))


def triggered_calls(
    format: ToolFormat,
    tools: Sequence[Tool],
    special_tokens: Mapping[str, int],
    *,
    parallel: bool,
    reasoning: ReasoningFormat | None = None,
    inside_reasoning: bool = False,
) -> str:
    """Text in which every call is one of `tools`, with arguments of its schema.

    From where the model opens a call, the grammar holds it. Where calls have no opening of their
    own, an answer is either calls or text.
    """
    grammar = CallGrammar(special_tokens)
    thinking = _thinking(grammar, reasoning, inside_reasoning)
    if not format.trigger:
        calls = _calls(grammar, format, tools, parallel=parallel)
        return grammar.lark(_join(thinking, f"({calls} | {format.plain_answer(grammar)})"))
    section = _calls(grammar, format, tools, parallel=parallel, after=format.trigger)
    opened = grammar.text_until_opened(format.trigger)
    repeat = f"{{0,{MAX_CALLS}}}" if parallel else "?"
    return (
        grammar.lark(_join(thinking, f"({opened} {section}){repeat} TEXT"))
        + f"TEXT: /{ANY_TEXT}/\n"
    )


def after_reasoning(
    guide: Guide, special_tokens: Mapping[str, int], reasoning: ReasoningFormat, *, inside: bool
) -> str:
    """A grammar for what the model thinks, followed by an answer that `guide` describes.

    Raises InvalidRequest.
    """
    grammar = CallGrammar(special_tokens)
    answer = grammar.rule(_expression(guide, special_tokens))
    return grammar.lark(_join(_thinking(grammar, reasoning, inside), answer))


def _expression(guide: Guide, special_tokens: Mapping[str, int]) -> str:
    match guide.kind:
        case "json_schema":
            return json_expression(json.loads(guide.text))
        case "regex":
            return regex_expression(guide.text)
        case "grammar":
            return f"%lark {{\n{as_lark(guide.text)}\n}}"
        case "structural_tag":
            lark = structural_tag_grammar(json.loads(guide.text), special_tokens)
            return f"%lark {{\n{lark}\n}}"


def _calls(
    grammar: CallGrammar,
    format: ToolFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    after: str = "",
) -> str:
    """Calls with what encloses them; `after` is consumed already."""
    rules = [format.describe(grammar, tool) for tool in tools]
    begin, end = format.section
    if after and not begin:
        # The trigger is the beginning of each call: describe calls without it, too.
        opened = CallGrammarWithoutPrefix(grammar, after)
        rules = [format.describe(opened, tool) for tool in tools]
        return alternatives(rules)
    call = alternatives(rules)
    more = ""
    if parallel:
        more = f"({_join(grammar.literal(format.separator), call)}){{0,{MAX_CALLS - 1}}}"
    return _join(grammar.literal(begin.removeprefix(after)), call, more, grammar.literal(end))


class CallGrammarWithoutPrefix(CallGrammar):
    """Adds rules to another grammar, and leaves out the first literal's beginning."""

    def __init__(self, grammar: CallGrammar, prefix: str) -> None:
        self.__dict__ = grammar.__dict__
        self._prefix = prefix

    def literal(self, text: str) -> str:
        return super().literal(text.lstrip("\n").removeprefix(self._prefix))


def _thinking(grammar: CallGrammar, reasoning: ReasoningFormat | None, inside: bool) -> str:
    if reasoning is None:
        return ""
    space = grammar.rule(r"/[ \t\n]{0,4}/")
    rest = f"{grammar.text_before(reasoning.end)} {space}"
    if inside:
        return rest
    return f"({grammar.literal(reasoning.begin)} {rest})?"


def _join(*expressions: str) -> str:
    return " ".join(each for each in expressions if each)
