"""`/v1/chat/completions`: its request, and the bytes of its responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta, Struct

from serving.errors import InvalidRequest
from serving.frontend.api.fields import (
    GenerationFields,
    Tokens,
    check_text,
    decode_request,
    refuse_unsupported,
    sample_seed,
)
from serving.frontend.api.logprobs import chat_logprobs
from serving.frontend.api.plan import CompletionApi, CompletionPlan
from serving.frontend.api.writer import Identity, Writer
from serving.frontend.model import LoadedModel
from serving.text.detokenize import Delta, TokenText
from serving.text.preprocess import PreparedRequest, SampleGroup


class ContentPart(Struct):
    """A part of a message's content. Only `text` parts are supported."""

    type: str
    text: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str


class MessageToolCall(Struct):
    """A call from an earlier answer. Chat templates that support tools render it."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Struct, forbid_unknown_fields=True):
    """One message. It may have fields that clients copy from an earlier answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None

    def for_template(self, index: int) -> dict[str, Any]:
        """The form that chat templates read. `index` is the message's. Raises InvalidRequest."""
        where = f"messages[{index}]"
        content = self._text(where)
        check_text(content, f"{where}.content")
        # Templates know `system`; `developer` is its newer name.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            check_text(self.name, f"{where}.name")
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = msgspec.to_builtins(self.tool_calls)
        return message

    def _text(self, where: str) -> str:
        """Parts are joined by newlines, so that a document and a question stay apart."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role == "assistant" and (self.tool_calls or self.refusal):
                return self.refusal or ""
            raise InvalidRequest(f"`{where}.content` is required", param=f"{where}.content")
        texts = []
        for position, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"Content parts of type `{part.type[:50]}` are not supported, only `text`",
                    param=f"{where}.content[{position}]",
                )
            texts.append(part.text)
        if not texts:
            raise InvalidRequest(f"`{where}.content` has no parts", param=f"{where}.content")
        return "\n".join(texts)


class ChatRequest(GenerationFields, kw_only=True):
    """The body. Fields from `store` on have no effect; those from `tools` on see NEUTRAL."""

    messages: list[Message]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    moderation: Any = None
    web_search_options: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "moderation": (None,),
    "web_search_options": (None,),
}

_decoder = msgspec.json.Decoder(ChatRequest)


def parse(body: bytes) -> ChatRequest:
    """Decode the body and check what needs no model. Raises InvalidRequest."""
    request = decode_request(body, _decoder)
    if not request.messages:
        raise InvalidRequest("`messages` is empty", param="messages")
    refuse_unsupported(request, NEUTRAL)
    request.check_stream_options()
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    return request


async def prepare(request: ChatRequest, model: LoadedModel, request_id: str) -> CompletionPlan:
    """Raises InvalidRequest."""
    preprocessor = model.preprocessor
    stop = request.stop_strings()
    guide = await request.checked_guide(model)
    token_ids = await preprocessor.encode_chat(
        [message.for_template(index) for index, message in enumerate(request.messages)],
        add_generation_prompt=request.add_generation_prompt is not False,
        template_variables=request.chat_template_kwargs,
    )
    requested = request.max_completion_tokens or request.max_tokens
    sampling = request.sampling(
        preprocessor,
        max_tokens=preprocessor.resolve_max_tokens(
            len(token_ids), requested, default=None, param="messages"
        ),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        guide=guide,
    )
    num_samples = request.n or 1
    sample_group = SampleGroup() if num_samples > 1 else None
    samples = [
        PreparedRequest(
            request_id=request_id if num_samples == 1 else f"{request_id}-{sample}",
            token_ids=token_ids,
            sampling=sample_seed(sampling, sample),
            stop=stop,
            skip_special_tokens=request.skip_special_tokens is not False,
            session=request.prompt_cache_key or request.user,
            sample_group=sample_group,
        )
        for sample in range(num_samples)
    ]
    fingerprint = model.card.engine_fingerprint
    writer = ChatWriter(
        Identity.new(request_id, "chat.completion.chunk", request.model, fingerprint),
        Identity.new(request_id, "chat.completion", request.model, fingerprint),
        stream_usage=request.include_usage,
        token_text=model.token_text if request.logprobs else None,
    )
    return CompletionPlan(
        samples=samples,
        writer=writer,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        samples_per_prompt=num_samples,
    )


class ChatWriter(Writer):
    """Each choice of a stream begins with its role and ends with its finish_reason."""

    def __init__(
        self,
        chunk: Identity,
        whole: Identity,
        *,
        stream_usage: bool,
        token_text: TokenText | None,
    ) -> None:
        super().__init__(chunk, whole, stream_usage=stream_usage)
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
        if delta.text or delta.logprobs:
            choices.append(
                b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
                % (index, orjson.dumps(delta.text), self._logprobs(delta))
            )
        if delta.finish_reason is not None:
            choices.append(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}'
                % (index, delta.finish_reason.encode())
            )
        return choices

    def _choice(self, index: int, delta: Delta) -> bytes:
        return (
            b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null},'
            b'"logprobs":%b,"finish_reason":%b}'
        ) % (
            index,
            orjson.dumps(delta.text),
            self._logprobs(delta),
            orjson.dumps(delta.finish_reason),
        )

    def _logprobs(self, delta: Delta) -> bytes:
        if self._token_text is None:
            return b"null"
        return orjson.dumps(chat_logprobs(delta.logprobs or (), self._token_text))


API = CompletionApi("chat.completions", "chatcmpl-", parse, prepare)
