"""The bytes of a response of `/v1/messages`: the message as a whole, or the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from serving.frontend.api.errors import ApiError
from serving.frontend.api.messages.errors import error_body
from serving.frontend.api.writer import ResponseWriter, Usage, json_event
from serving.text.detokenize import Delta
from serving.text.parts import Arguments, Part, Reasoning, Text, ToolCall


class MessagesWriter(ResponseWriter):
    """Writes one message. `prompt_tokens` is known when a stream begins."""

    def __init__(self, message_id: str, model: str, prompt_tokens: int) -> None:
        self._id, self._model, self._prompt_tokens = message_id, model, prompt_tokens
        self._blocks: list[dict[str, Any]] = []
        self._text: list[str] = []  # of the block that is being written
        self._is_open = False
        self._finish_reason: str | None = None
        self._stop_string: str | None = None

    # --- a stream ------------------------------------------------------------------------------

    def opening(self) -> bytes:
        message = self._message([], None)
        message["usage"] = _usage(Usage(prompt_tokens=self._prompt_tokens))
        return _event("message_start", message=message) + _event("ping")

    def chunks(self, index: int, deltas: Sequence[Delta]) -> bytes:
        events: list[bytes] = []
        for delta in deltas:
            for part in delta.as_parts():
                self._write(part, events)
            self._finish_reason = delta.finish_reason or self._finish_reason
            self._stop_string = delta.stop_string or self._stop_string
        return b"".join(events)

    def closing(self, usage: Usage) -> bytes:
        events: list[bytes] = []
        self._close(events)
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_string}
        events.append(_event("message_delta", delta=delta, usage=_usage(usage)))
        events.append(_event("message_stop"))
        return b"".join(events)

    def failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    # --- as a whole ----------------------------------------------------------------------------

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        self.chunks(0, deltas)
        self._close([])
        message = self._message(self._blocks, self._stop_reason())
        message["usage"] = _usage(usage)
        return orjson.dumps(message)

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": self._stop_string,
        }

    def _stop_reason(self) -> str:
        if self._finish_reason == "length":
            return "max_tokens"
        if self._stop_string is not None:
            return "stop_sequence"
        return "tool_use" if any(b["type"] == "tool_use" for b in self._blocks) else "end_turn"

    # --- blocks --------------------------------------------------------------------------------

    def _write(self, part: Part, events: list[bytes]) -> None:
        match part:
            case Text(text):
                self._continue("text", events)
                self._delta({"type": "text_delta", "text": text}, text, events)
            case Reasoning(text):
                self._continue("thinking", events)
                self._delta({"type": "thinking_delta", "thinking": text}, text, events)
            case ToolCall():
                self._close(events)
                block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
                self._open(block, events)
            case Arguments(_, text):
                self._delta({"type": "input_json_delta", "partial_json": text}, text, events)

    def _continue(self, kind: str, events: list[bytes]) -> None:
        """Have a block of this kind open."""
        if self._is_open and self._blocks[-1]["type"] == kind:
            return
        self._close(events)
        empty = {"signature": ""} if kind == "thinking" else {}
        self._open({"type": kind, kind: "", **empty}, events)

    def _open(self, block: dict[str, Any], events: list[bytes]) -> None:
        self._blocks.append(block)
        self._is_open, self._text = True, []
        index = len(self._blocks) - 1
        events.append(_event("content_block_start", index=index, content_block=block))

    def _delta(self, delta: dict[str, Any], text: str, events: list[bytes]) -> None:
        self._text.append(text)
        index = len(self._blocks) - 1
        events.append(_event("content_block_delta", index=index, delta=delta))

    def _close(self, events: list[bytes]) -> None:
        """Complete the open block, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        block, text = self._blocks[-1], "".join(self._text)
        index = len(self._blocks) - 1
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            # Clients give it back with the thought. It signs nothing here, and must not be empty.
            block["signature"] = self._id
            delta = {"type": "signature_delta", "signature": self._id}
            events.append(_event("content_block_delta", index=index, delta=delta))
        events.append(_event("content_block_stop", index=index))


def _input(text: str) -> Any:
    """A call's arguments; cut ones are none, since the API has no place for a part of JSON.

    Nor for what cannot be written again: the model decides how deep it nests.
    """
    try:
        value = orjson.loads(text)  # Turns integers of more than 64 bits into floats.
        orjson.dumps([[[value]]])  # as deep as in a message
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _event(type: str, **fields: Any) -> bytes:
    return b"event: " + type.encode() + b"\ndata: " + json_event({"type": type, **fields}) + b"\n\n"
