"""The body of `POST /v1/responses`, and the conversation that it describes.

Fields that name a service of OpenAI's own (web search, files, prompts in its store) are ignored, as
are tools that are no functions: agents send them to any server. `ignored` names what was dropped.
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
from serving.text.conversation import Conversation, Message, ToolChoice, arguments_for_template
from serving.text.tool_calls.base import Tool

Item = dict[str, Any]
"""An input or output item, as the API writes it."""

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class ResponsesTextFormat(Struct):
    """Of the answer: `text`, `json_object`, or `json_schema` with its schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    format: ResponsesTextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesStreamOptions(Struct):
    include_obfuscation: bool | None = None


def _read_tool(tool: dict[str, Any], where: str) -> Tool | str:
    """A function, or the type of a tool that is none."""
    if tool.get("type", "function") != "function":
        return str(tool["type"])[:50]
    return read_tool(tool, where)


_tools = ToolReader("tools", dict[str, Any], _read_tool)


class ResponsesRequest(Struct, kw_only=True):
    """What it has in common with OpenAI's specification; unknown fields are dropped."""

    model: str
    input: str | list[Item] = ""
    instructions: str | None = None
    tools: Raw = ABSENT
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    include: list[str] | None = None
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def input_items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def guide(self) -> Guide | None:
        """Of the answer's text. Raises InvalidRequest without a schema where one belongs."""
        format = self.text.format if self.text is not None else None
        if format is None or format.type == "text":
            return None
        if format.type == "json_object":
            return Guide("json_schema", '{"type":"object"}')
        if format.schema is None:
            raise InvalidRequest("`text.format.schema` is required", param="text.format.schema")
        schema = closed_schema(format.schema) if format.strict else format.schema
        return Guide("json_schema", msgspec.json.encode(schema).decode())

    def choice(self) -> ToolChoice:
        """Raises InvalidRequest for a choice that is none of the specification's."""
        choice = self.tool_choice
        match choice:
            case None | "auto":
                return ToolChoice("auto")
            case "none":
                return ToolChoice("none")
            case "required":
                return ToolChoice("required")
            case {"type": "function", "name": str(name)}:
                return ToolChoice("required", (name,))
            case {
                "type": "allowed_tools",
                "mode": "auto" | "required" as mode,
                "tools": list(tools),
            }:
                names = tuple(str(tool.get("name")) for tool in tools if isinstance(tool, dict))
                return ToolChoice(mode, names)
        raise InvalidRequest("`tool_choice` is not understood", param="tool_choice")


_decoder = RequestDecoder(ResponsesRequest)


def parse(body: bytes) -> ResponsesRequest:
    """Raises InvalidRequest for what is not JSON or has a wrong type."""
    return _decoder.decode(body)


def conversation(request: ResponsesRequest, items: list[Item]) -> tuple[Conversation, list[str]]:
    """The conversation of `items` (earlier ones first), and what was ignored in the request.

    Raises InvalidRequest.
    """
    messages: list[Message] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    reader = _ItemReader(messages)
    for index, item in enumerate(items):
        reader.read(item, f"input[{index}]")
    if not any(message["role"] != "system" for message in reader.messages):
        raise InvalidRequest("`input` has no messages", param="input")
    described = _tools.read(request.tools)
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning is not None and request.reasoning.effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning.effort)
    return (
        Conversation(
            messages=_merged_system(reader.messages),
            tools=described.tools,
            tool_choice=request.choice(),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            answer_guide=request.guide(),
            guide_param="text.format",
            template_variables=variables,
            param="input",
        ),
        [*described.ignored, *reader.ignored],
    )


class _ItemReader:
    """Puts items together to messages: an assistant's reasoning, text and calls are one message."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.ignored: list[str] = []
        self._names: dict[str, str] = {}  # of functions, by call id

    def read(self, item: Item, where: str) -> None:
        kind = item.get("type", "message")
        match kind:
            case "message":
                self._message(item, where)
            case "function_call":
                self._call(item, where)
            case "function_call_output" | "custom_tool_call_output":
                call_id = str(item.get("call_id", ""))
                message = {
                    "role": "tool",
                    "tool_call_id": call_id,
                    "content": _text(item.get("output", ""), f"{where}.output"),
                }
                if call_id in self._names:
                    message["name"] = self._names[call_id]
                self.messages.append(message)
            case "reasoning":
                text = _text(item.get("content") or item.get("summary") or "", where)
                if text:
                    self._assistant()["reasoning_content"] = text
            case _:
                self.ignored.append(str(kind)[:50])

    def _message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise InvalidRequest(f"`{where}.role` is not understood", param=f"{where}.role")
        content = _text(item.get("content") or "", f"{where}.content")
        if role == "assistant":
            message = self._assistant()
            message["content"] = message["content"] + content
            return
        self.messages.append(
            {"role": "system" if role == "developer" else role, "content": content}
        )

    def _call(self, item: Item, where: str) -> None:
        name, call_id = item.get("name"), item.get("call_id") or item.get("id")
        if not isinstance(name, str) or not isinstance(call_id, str):
            raise InvalidRequest(f"`{where}` needs `name` and `call_id`", param=where)
        self._names[call_id] = name
        arguments = item.get("arguments")
        call = {
            "id": call_id,
            "type": "function",
            "function": {
                "name": name,
                "arguments": arguments_for_template(
                    arguments if isinstance(arguments, str) else "{}"
                ),
            },
        }
        self._assistant().setdefault("tool_calls", []).append(call)

    def _assistant(self) -> Message:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def _text(content: Any, where: str) -> str:
    """Text, or text parts put together. Raises InvalidRequest for images and the like."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"`{where}` must be text or a list of parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            texts.append(str(part.get("refusal", "")))
        elif kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise InvalidRequest(
                f"Content parts of type `{str(kind)[:50]}` are not supported, only text",
                param=f"{where}[{index}]",
            )
    return "\n".join(texts)


def _merged_system(messages: list[Message]) -> list[Message]:
    """System messages at the beginning as one: most templates take a single one."""
    count = 0
    while count < len(messages) and messages[count]["role"] == "system":
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]
