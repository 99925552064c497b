"""The body of `POST /v1/chat/completions`, and the conversation that it describes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.fields import (
    GenerationFields,
    RequestDecoder,
    Tokens,
    check_text,
    refuse_unsupported,
)
from serving.frontend.api.tools import ABSENT, ToolReader, read_tool
from serving.text.conversation import (
    Conversation,
    Message,
    ToolChoice,
    arguments_for_template,
    name_results,
)
from serving.text.tool_calls.base import Tool, ToolSet


class ContentPart(Struct):
    """A part of a message's content. Only `text` parts are supported."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(Struct):
    """A call from an earlier answer. Chat templates that support tools render it."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"

    def for_template(self) -> dict[str, Any]:
        arguments = self.function.arguments
        if isinstance(arguments, str):
            arguments = arguments_for_template(arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(Struct):
    """One message, including what clients echo from an earlier answer."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    reasoning: Any = None

    def for_template(self, index: int) -> Message:
        """As chat templates read it. Raises InvalidRequest. `index`: of this message."""
        where = f"messages[{index}]"
        content = self._text(where)
        check_text(content, f"{where}.content")
        # Templates know `system` and `tool`; `developer` is a newer name, `function` an older one.
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: Message = {"role": role, "content": content}
        if self.name is not None:
            check_text(self.name, f"{where}.name")
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if calls := self._calls():
            message["tool_calls"] = [call.for_template() for call in calls]
        thought = self.reasoning_content or self.reasoning
        if self.role == "assistant" and isinstance(thought, str) and thought:
            check_text(thought, f"{where}.reasoning_content")
            message["reasoning_content"] = thought
        return message

    def _calls(self) -> list[MessageToolCall]:
        if self.function_call is not None:
            return [MessageToolCall(self.function_call)]
        return self.tool_calls or []

    def _text(self, where: str) -> str:
        """Parts are joined by newlines, so that a document and a question stay apart."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role in ("assistant", "tool", "function"):
                return self.refusal or ""
            raise InvalidRequest(f"`{where}.content` is required", param=f"{where}.content")
        texts = []
        for position, part in enumerate(self.content):
            text = part.refusal if part.type == "refusal" else part.text
            if part.type not in ("text", "refusal") or text is None:
                raise InvalidRequest(
                    f"Content parts of type `{part.type[:50]}` are not supported, only `text`",
                    param=f"{where}.content[{position}]",
                )
            texts.append(text)
        if not texts and self.role != "assistant":
            raise InvalidRequest(f"`{where}.content` has no parts", param=f"{where}.content")
        return "\n".join(texts)


class FunctionTool(Struct):
    """A tool of a request: a function that the client runs."""

    function: dict[str, Any]
    type: Literal["function"] = "function"


def _read_tool(tool: FunctionTool, where: str) -> Tool:
    return read_tool(tool.function, f"{where}.function")


_tools = ToolReader("tools", FunctionTool, _read_tool)
_functions = ToolReader("functions", dict[str, Any], read_tool)


class ChatRequest(GenerationFields, kw_only=True):
    """The body. From `store` on: fields without effect here; from `modalities` on, see NEUTRAL."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    tools: Raw = ABSENT
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Raw = ABSENT
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning: Any = None
    thinking_budget: Annotated[int, Meta(ge=0)] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None

    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    web_search_options: Any = None

    def conversation(self) -> Conversation:
        """Raises InvalidRequest. Whether the guide compiles is seen later."""
        named = self.guide()
        variables = dict(self.chat_template_kwargs or {})
        effort = self.reasoning_effort
        if effort is None and isinstance(self.reasoning, dict):
            effort = self.reasoning.get("effort")
        if effort is not None:
            variables.setdefault("reasoning_effort", effort)
            if effort == "none":
                variables.setdefault("enable_thinking", False)
        budget = self.thinking_budget
        if budget is None:
            budget = self.thinking_token_budget
        if budget is None and isinstance(self.reasoning, dict):
            limit = self.reasoning.get("max_tokens")
            budget = limit if isinstance(limit, int) and limit >= 0 else None
        messages = [message.for_template(index) for index, message in enumerate(self.messages)]
        name_results(messages)
        return Conversation(
            messages=messages,
            tools=self._tools(),
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            answer_guide=named.guide if named is not None else None,
            guide_param=named.param if named is not None else "response_format",
            template_variables=variables,
            reasoning_budget=budget,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message is True,
        )

    def _tools(self) -> ToolSet:
        tools, functions = _tools.read(self.tools).tools, _functions.read(self.functions).tools
        return ToolSet((*tools, *functions)) if functions else tools

    def _choice(self) -> ToolChoice:
        choice = self.tool_choice if self.tool_choice is not None else self.function_call
        match choice:
            case None | "auto":
                return ToolChoice("auto")
            case "none":
                return ToolChoice("none")
            case "required":
                return ToolChoice("required")
            case {"type": "function", "function": {"name": str(name)}}:
                return ToolChoice("required", (name,))
            case {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)},
            }:
                return ToolChoice(mode, tuple(_allowed_name(tool) for tool in tools))
            case {"name": str(name)} if self.tool_choice is None:  # `function_call`
                return ToolChoice("required", (name,))
        raise InvalidRequest(
            "`tool_choice` must be `none`, `auto`, `required`, a function by its name, or "
            "`allowed_tools`",
            param="tool_choice",
        )


def _allowed_name(tool: Any) -> str:
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise InvalidRequest("`allowed_tools.tools` must name functions", param="tool_choice")


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
}

_decoder = RequestDecoder(ChatRequest)


def parse(body: bytes) -> ChatRequest:
    """Everything that can be checked without the model. Raises InvalidRequest."""
    request = _decoder.decode(body)
    if not request.messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    refuse_unsupported(request, NEUTRAL)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    return request
