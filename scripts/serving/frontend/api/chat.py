"""`/v1/chat/completions`: its request, and the bytes of its responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from msgspec import Meta, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.answer import prepare_answer
from serving.frontend.api.fields import (
    GenerationFields,
    RequestDecoder,
    StreamOptions,
    Tokens,
    check_text,
    refuse_unsupported,
)
from serving.frontend.api.logprobs import chat_logprobs
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.tools import MAX_TOOLS, read_tool
from serving.frontend.api.writer import ChoicesWriter, Identity, json_text, token_ids_field
from serving.frontend.model import LoadedModel
from serving.text.conversation import (
    Conversation,
    Message,
    ToolChoice,
    arguments_for_template,
    name_results,
)
from serving.text.detokenize import Delta
from serving.text.parts import Answer, Arguments, Part, Reasoning, Text, ToolCall, assemble
from serving.text.token_text import TokenText
from serving.text.tool_calls.base import Tool


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


class ChatRequest(GenerationFields, kw_only=True):
    """The body. From `store` on: fields without effect here; from `modalities` on, see NEUTRAL."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
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

    def _tools(self) -> list[Tool]:
        functions = [
            (tool.function, f"tools[{i}].function") for i, tool in enumerate(self.tools or [])
        ]
        functions += [(each, f"functions[{i}]") for i, each in enumerate(self.functions or [])]
        return [read_tool(function, where) for function, where in functions]

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


async def prepare(request: ChatRequest, model: LoadedModel, request_id: str) -> CompletionPlan:
    """Raises InvalidRequest."""
    asked = request.max_completion_tokens
    if asked is None:
        asked = request.max_tokens
    samples = await prepare_answer(
        request,
        request.conversation(),
        model,
        request_id,
        max_tokens=asked,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        session=request.prompt_cache_key or request.user,
    )
    fingerprint = model.card.engine_fingerprint
    writer = ChatWriter(
        Identity.new(request_id, "chat.completion.chunk", request.model, fingerprint),
        Identity.new(request_id, "chat.completion", request.model, fingerprint),
        request.stream_options,
        token_text=model.token_text if request.logprobs else None,
    )
    return CompletionPlan(
        samples=samples,
        writer=writer,
        stream=bool(request.stream),
        samples_per_prompt=len(samples),
    )


class ChatWriter(ChoicesWriter):
    """Each choice of a stream begins with its role and ends with its finish_reason."""

    def __init__(
        self,
        chunk: Identity,
        whole: Identity,
        stream_options: StreamOptions | None,
        *,
        token_text: TokenText | None,
    ) -> None:
        super().__init__(chunk, whole, stream_options)
        self._token_text = token_text
        self._begun: set[int] = set()

    def _chunk_choices(self, index: int, delta: Delta) -> list[bytes]:
        choices = []
        if index not in self._begun:
            self._begun.add(index)
            choices.append(
                b'{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},'
                b'"logprobs":null,"finish_reason":null}' % index
            )
        logprobs = self._logprobs(delta)
        if delta.token_ids is not None:
            choices.append(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":null%b}'
                % (index, token_ids_field(delta))
            )
        if delta.parts is not None:
            for part in delta.parts:
                choices.append(_choice_delta(index, _part_delta(part), logprobs))
                logprobs = b"null"
            if not delta.parts and delta.logprobs:
                choices.append(_choice_delta(index, b'{"content":""}', logprobs))
        elif delta.text or delta.logprobs:
            content = b'{"content":%b}' % json_text(delta.text)
            choices.append(_choice_delta(index, content, logprobs))
        if delta.finish_reason is not None:
            choices.append(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}'
                % (index, delta.finish_reason.encode())
            )
        return choices

    def _choice(self, index: int, delta: Delta) -> bytes:
        if delta.parts is None:
            message = b'{"role":"assistant","content":%b,"refusal":null}' % json_text(delta.text)
        else:
            message = orjson.dumps(_message(assemble(delta.parts)))
        return b'{"index":%d,"message":%b,"logprobs":%b,"finish_reason":%b%b}' % (
            index,
            message,
            self._logprobs(delta),
            orjson.dumps(delta.finish_reason),
            token_ids_field(delta),
        )

    def _logprobs(self, delta: Delta) -> bytes:
        if self._token_text is None:
            return b"null"
        return orjson.dumps(chat_logprobs(delta.logprobs or (), self._token_text))


def _choice_delta(index: int, content: bytes, logprobs: bytes) -> bytes:
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null}' % (
        index,
        content,
        logprobs,
    )


def _part_delta(part: Part) -> bytes:
    """Reasoning goes by both names that clients read."""
    match part:
        case Text(text):
            return b'{"content":%b}' % json_text(text)
        case Reasoning(text):
            encoded = json_text(text)
            return b'{"reasoning_content":%b,"reasoning":%b}' % (encoded, encoded)
        case ToolCall(number, call_id, name):
            return (
                b'{"tool_calls":[{"index":%d,"id":%b,"type":"function",'
                b'"function":{"name":%b,"arguments":""}}]}'
            ) % (number, orjson.dumps(call_id), orjson.dumps(name))
        case Arguments(number, text):
            return b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (
                number,
                json_text(text),
            )


def _message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.tool_calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in answer.tool_calls
        ]
    return message


API = CompletionApi("chat.completions", "chatcmpl-", parse, prepare)
