"""The body of `POST /v1/messages` and of `count_tokens`, and the conversation that it describes.

`cache_control` is accepted everywhere and has no effect: prompts are cached anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.fields import RequestDecoder
from serving.frontend.api.tools import ABSENT, ToolReader, read_tool
from serving.grammar.schema import closed_schema
from serving.protocol import Guide
from serving.text.conversation import Conversation, Message, ToolChoice
from serving.text.tool_calls.base import Tool

Block = dict[str, Any]


class InputMessage(Struct):
    """One message; `content` is text or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolChoiceField(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """`adaptive` lets the model decide, as far as its template can."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class JsonFormat(Struct):
    """Of the answer's text."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    format: JsonFormat | None = None
    effort: str | None = None


def _read_tool(tool: dict[str, Any], where: str) -> Tool | str:
    """A function, or the type of one of Anthropic's own tools."""
    if tool.get("type", "custom") != "custom":
        return str(tool["type"])[:50]
    return read_tool(tool, where, schema_key="input_schema")


_tools = ToolReader("tools", dict[str, Any], _read_tool)


class MessagesRequest(Struct, kw_only=True):
    """What it has in common with Anthropic's API; unknown fields are dropped."""

    model: str
    messages: list[InputMessage]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    system: str | list[Block] | None = None
    tools: Raw = ABSENT
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    metadata: dict[str, Any] | None = None

    def choice(self) -> ToolChoice:
        """Raises InvalidRequest for `tool` without a name."""
        choice = self.tool_choice
        match choice.type if choice is not None else "auto":
            case "any":
                return ToolChoice("required")
            case "none":
                return ToolChoice("none")
            case "tool":
                if choice is None or not choice.name:
                    raise InvalidRequest("`tool_choice.name` is required", param="tool_choice.name")
                return ToolChoice("required", (choice.name,))
        return ToolChoice("auto")

    def guide(self) -> Guide | None:
        """Of the answer's text. Its objects are closed, as Anthropic's specification has them."""
        if self.output_config is None or self.output_config.format is None:
            return None
        schema = closed_schema(self.output_config.format.schema)
        return Guide("json_schema", msgspec.json.encode(schema).decode())

    def template_variables(self) -> dict[str, Any]:
        """What the request says about thinking, by the names that chat templates use."""
        variables: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type != "adaptive":
            variables["enable_thinking"] = self.thinking.type == "enabled"
        if self.output_config is not None and self.output_config.effort is not None:
            variables["reasoning_effort"] = self.output_config.effort
        return variables


_decoder = RequestDecoder(MessagesRequest)


def parse_count(body: bytes) -> MessagesRequest:
    """Of `count_tokens`, which needs no `max_tokens`. Raises InvalidRequest."""
    request = _decoder.decode(body)
    if not request.messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    return request


def parse(body: bytes) -> MessagesRequest:
    """Raises InvalidRequest."""
    request = parse_count(body)
    if request.max_tokens is None:
        raise InvalidRequest("`max_tokens` is required", param="max_tokens")
    return request


def conversation(request: MessagesRequest) -> tuple[Conversation, list[str]]:
    """The conversation, and what was ignored in the request. Raises InvalidRequest."""
    messages: list[Message] = []
    names: dict[str, str] = {}
    if request.system:
        messages.append({"role": "system", "content": _text(request.system, "system")})
    for index, message in enumerate(request.messages):
        where = f"messages[{index}].content"
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(message.content, where, names))
        else:
            messages += _user(message.role, message.content, where, names)
    described = _tools.read(request.tools)
    parallel = request.tool_choice is None or not request.tool_choice.disable_parallel_tool_use
    return (
        Conversation(
            messages=messages,
            tools=described.tools,
            tool_choice=request.choice(),
            parallel_tool_calls=parallel,
            answer_guide=request.guide(),
            guide_param="output_config.format",
            template_variables=request.template_variables(),
            reasoning_budget=request.thinking.budget_tokens if request.thinking else None,
            # An answer that the client began is continued.
            add_generation_prompt=messages[-1]["role"] != "assistant",
            continue_final_message=messages[-1]["role"] == "assistant",
        ),
        [*described.ignored],
    )


def _assistant(blocks: list[Block], where: str, names: dict[str, str]) -> Message:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text", "")))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                continue
            case "tool_use":
                name, call_id = str(block.get("name", "")), str(block.get("id", ""))
                names[call_id] = name
                function = {"name": name, "arguments": block.get("input") or {}}
                calls.append({"id": call_id, "type": "function", "function": function})
            case kind:
                raise _unsupported(kind, f"{where}[{index}]")
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, blocks: list[Block], where: str, names: dict[str, str]) -> list[Message]:
    """Results of tools are messages of their own, before the text that goes with them."""
    messages: list[Message] = []
    texts = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        match block.get("type"):
            case "text":
                texts.append(str(block.get("text", "")))
            case "tool_result":
                call_id = str(block.get("tool_use_id", ""))
                content = _text(block.get("content") or "", f"{place}.content")
                if block.get("is_error"):
                    content = f"Error: {content}"
                message = {"role": "tool", "tool_call_id": call_id, "content": content}
                if call_id in names:
                    message["name"] = names[call_id]
                messages.append(message)
            case kind:
                raise _unsupported(kind, place)
    if texts or not messages:
        messages.append({"role": role, "content": "\n".join(texts)})
    return messages


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content if isinstance(content, list) else [content]):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise _unsupported(kind, f"{where}[{index}]")
        texts.append(str(block.get("text", "")))
    return "\n".join(texts)


def _unsupported(kind: Any, where: str) -> InvalidRequest:
    return InvalidRequest(
        f"Content blocks of type `{str(kind)[:50]}` are not supported, only text and tools",
        param=where,
    )
