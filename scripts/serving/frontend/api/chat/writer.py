"""The bytes of a chat completion: the chunks of a stream, or the whole body."""

from __future__ import annotations

from typing import Any

import orjson

from serving.frontend.api.fields import StreamOptions
from serving.frontend.api.logprobs import chat_logprobs
from serving.frontend.api.writer import ChoicesWriter, Identity, json_text, token_ids_field
from serving.text.detokenize import Delta
from serving.text.parts import Answer, Arguments, Part, Reasoning, Text, ToolCall, assemble
from serving.text.token_text import TokenText


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
        if delta.parts is None and delta.token_ids is None:  # by far the most, and the cheapest
            if delta.text or delta.logprobs:
                logprobs = b"null" if self._token_text is None else self._logprobs(delta)
                choices.append(
                    b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
                    % (index, json_text(delta.text), logprobs)
                )
        else:
            choices += self._part_choices(index, delta)
        if delta.finish_reason is not None:
            choices.append(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}'
                % (index, delta.finish_reason.encode())
            )
        return choices

    def _part_choices(self, index: int, delta: Delta) -> list[bytes]:
        """Of an answer that is parsed, or whose token ids are asked for."""
        choices = []
        logprobs = self._logprobs(delta)
        if delta.token_ids is not None:
            choices.append(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":null%b}'
                % (index, token_ids_field(delta))
            )
        parts = delta.as_parts()
        for part in parts:
            choices.append(_choice_delta(index, _part_delta(part), logprobs))
            logprobs = b"null"
        if not parts and delta.logprobs:
            choices.append(_choice_delta(index, b'{"content":""}', logprobs))
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
