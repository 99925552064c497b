"""A conversation, in the form that every API's request is translated to, and its prompt.

Chat, Responses and Messages differ in how they write messages, tools and options. They all become
a `Conversation`, which one function turns into token ids, the grammar that guides the answer, and
what it takes to parse the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from serving.errors import InvalidRequest
from serving.protocol import Guide
from serving.text.answer_format import AnswerFormat
from serving.text.answer_parser import AnswerParser
from serving.text.reasoning import ReasoningFormat
from serving.text.tool_calls.base import Tool, ToolFormat, ToolSet
from serving.text.tool_calls.guide import after_reasoning, required_calls, triggered_calls
from serving.text.tool_calls.plain_json import preamble

Message = dict[str, Any]
"""As chat templates read it: `role`, `content`, and perhaps `tool_calls`, `reasoning_content`..."""


class ToolChoice(Struct, frozen=True):
    """Whether the model may or must call, and which of the tools. No `names`: any of them."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()


class Conversation(Struct, kw_only=True):
    """What the model is asked.

    `reasoning_budget` is the most tokens of reasoning, after which the answer begins.
    `param` names the request's field with the messages, `guide_param` the one with `answer_guide`.
    """

    messages: list[Message]
    tools: ToolSet = ToolSet()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    answer_guide: Guide | None = None
    guide_param: str = "response_format"
    template_variables: Mapping[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_budget: int | None = None
    param: str = "messages"

    def callable_tools(self) -> ToolSet:
        """Those that the choice allows. Raises InvalidRequest for a name that is no tool's."""
        if self.tool_choice.mode == "none":
            return ToolSet()
        known = {tool.name: tool for tool in self.tools}
        for name in self.tool_choice.names:
            if name not in known:
                raise InvalidRequest(
                    f"`tool_choice` names `{name[:100]}`, which is none of the tools",
                    param="tool_choice",
                )
        if self.tool_choice.mode == "required" and not self.tools:
            raise InvalidRequest(
                "`tool_choice` requires a call, but there are no `tools`", param="tool_choice"
            )
        names = self.tool_choice.names
        if not names:
            return self.tools
        return ToolSet(tool for tool in self.tools if tool.name in names)


class AnswerPlan(Struct, frozen=True):
    """How to guide and parse the answer to one prompt."""

    guide: Guide | None = None
    tool_format: ToolFormat | None = None
    tools: Mapping[str, Tool] = {}
    reasoning: ReasoningFormat | None = None
    starts_inside_reasoning: bool = False
    reasoning_budget: int | None = None
    reasoning_end_ids: tuple[int, ...] = ()
    """Tokens that end the reasoning when its budget is used up."""

    @property
    def needs_parser(self) -> bool:
        return self.tool_format is not None or self.reasoning is not None

    @property
    def kept_special_tokens(self) -> tuple[str, ...]:
        """Special tokens that the parser has to see in the text."""
        kept = self.tool_format.special_tokens if self.tool_format is not None else ()
        if self.reasoning is not None:
            kept += (self.reasoning.begin, self.reasoning.end)
        return kept

    def parser(self) -> AnswerParser:
        return AnswerParser(
            self.tool_format,
            self.tools,
            self.reasoning,
            starts_inside_reasoning=self.starts_inside_reasoning,
        )


def plan_answer(conversation: Conversation, formats: AnswerFormat, prompt_end: str) -> AnswerPlan:
    """`prompt_end` is the end of the rendered prompt, which may open the model's reasoning.

    Raises InvalidRequest for a tool choice without such a tool.
    """
    tools = conversation.callable_tools()
    tool_format = formats.tools.format if tools else None
    reasoning = formats.reasoning.format
    if formats.tools.format.reasoning is not None:  # Channels carry calls and reasoning alike.
        tool_format, reasoning = formats.tools.format, None
    inside = reasoning is not None and reasoning.is_open(prompt_end)
    thinking = reasoning or (tool_format.reasoning if tool_format is not None else None)
    return AnswerPlan(
        guide=_guide(conversation, formats, tools, thinking, inside),
        tool_format=tool_format,
        tools={tool.name: tool for tool in tools},
        reasoning=reasoning,
        starts_inside_reasoning=inside,
        reasoning_budget=conversation.reasoning_budget if thinking is not None else None,
        reasoning_end_ids=() if thinking is None else formats.reasoning_end_ids(thinking),
    )


def _guide(
    conversation: Conversation,
    formats: AnswerFormat,
    tools: Sequence[Tool],
    thinking: ReasoningFormat | None,
    inside: bool,
) -> Guide | None:
    """A required call and a strict tool are guided; then the answer's own form; else nothing."""
    special = formats.special_tokens
    parallel = conversation.parallel_tool_calls
    if tools and conversation.tool_choice.mode == "required":
        make = required_calls
        # A tool required by name is called once. Clients that name one read a single call, and a
        # small model would repeat it up to its limit of tokens.
        parallel = parallel and len(conversation.tool_choice.names) != 1
    elif any(tool.strict for tool in tools) and conversation.answer_guide is None:
        make = triggered_calls
    else:
        return _after_thinking(conversation.answer_guide, formats, thinking, inside)
    lark = make(
        formats.tools.format,
        tools,
        special,
        parallel=parallel,
        reasoning=thinking,
        inside_reasoning=inside,
    )
    return Guide("grammar", lark)


def _after_thinking(
    guide: Guide | None, formats: AnswerFormat, thinking: ReasoningFormat | None, inside: bool
) -> Guide | None:
    """`guide`, which applies to the answer and not to what the model thinks before it."""
    if guide is None or thinking is None:
        return guide
    lark = after_reasoning(guide, formats.special_tokens, thinking, inside=inside)
    return Guide("grammar", lark)


def messages_for(conversation: Conversation, formats: AnswerFormat) -> list[Message]:
    """The messages as the model's template can show them.

    A template that knows no tools gets them as text: the tools in the system message, calls as
    their JSON, results as messages of the user.
    """
    if formats.tools.template_knows_tools:
        return conversation.messages
    messages = [_without_tools(message) for message in conversation.messages]
    if conversation.tools and conversation.tool_choice.mode != "none":
        text = conversation.callable_tools().derive("preamble", preamble)
        if messages and messages[0]["role"] == "system":
            first = messages[0]
            messages[0] = {**first, "content": f"{first['content']}\n\n{text}"}
        else:
            messages.insert(0, {"role": "system", "content": text})
    return messages


def _without_tools(message: Message) -> Message:
    role = message["role"]
    if role == "tool":
        name = message.get("name") or "the function"
        return {"role": "user", "content": f"Result of {name}:\n{message['content']}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message.get("content") else []
    texts += [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return {"role": role, "content": "\n".join(texts)}


def arguments_for_template(arguments: str) -> Any:
    """A call's arguments as a mapping, which templates expect; text that is no JSON stays text."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates read them: OpenAI's objects."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in tools
    ]


def name_results(messages: list[Message]) -> None:
    """Give results of tools the name of their function, which some templates want to see."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            names[call["id"]] = call["function"]["name"]
        call_id = message.get("tool_call_id")
        if message["role"] == "tool" and "name" not in message and call_id in names:
            message["name"] = names[call_id]
