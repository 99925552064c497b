"""The bytes of a response of `/v1/responses`: the object as a whole, or the events of a stream.

Events and objects follow OpenAI's specification; `sequence_number` counts a stream's events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from serving.frontend.api.errors import ApiError
from serving.frontend.api.responses.request import Item
from serving.frontend.api.writer import ResponseWriter, Usage, json_event
from serving.text.detokenize import Delta
from serving.text.parts import Arguments, Part, Reasoning, Text, ToolCall


class ResponsesWriter(ResponseWriter):
    """Writes one response. `template` holds the fields that repeat the request."""

    def __init__(
        self,
        response_id: str,
        template: dict[str, Any],
        save: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        """`save` keeps a complete response, or returns False."""
        self._save = save
        self._template = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            **template,
        }
        self._suffix = response_id.removeprefix("resp_")
        self._num_events = 0
        self._output: list[Item] = []
        self._text: list[str] = []  # of the item that is being written
        self._finish_reason: str | None = None
        self._is_open = False

    # --- a stream ------------------------------------------------------------------------------

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunks(self, index: int, deltas: Sequence[Delta]) -> bytes:
        events: list[bytes] = []
        for delta in deltas:
            for part in delta.as_parts():
                self._write(part, events)
            self._finish_reason = delta.finish_reason or self._finish_reason
        return b"".join(events)

    def closing(self, usage: Usage) -> bytes:
        events: list[bytes] = []
        self._close(events)
        response = self.response(usage)
        events.append(self._event(f"response.{response['status']}", response=response))
        return b"".join(events)

    def failure(self, error: ApiError) -> bytes:
        events: list[bytes] = []
        self._close(events)
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        events.append(self._event("response.failed", response=response))
        return b"".join(events)

    # --- as a whole ----------------------------------------------------------------------------

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        self.chunks(0, deltas)
        self._close([])
        return orjson.dumps(self.response(usage))

    def response(self, usage: Usage) -> dict[str, Any]:
        """The complete response; its status follows from how generation ended."""
        is_cut = self._finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if self._save is not None and not self._save(response):
            response["store"] = False
        return response

    def _response(self, status: str) -> dict[str, Any]:
        return {
            **self._template,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output),
        }

    # --- items ---------------------------------------------------------------------------------

    def _write(self, part: Part, events: list[bytes]) -> None:
        match part:
            case Text(text):
                item = self._item("message", events)
                self._delta("response.output_text.delta", item, text, events, logprobs=[])
            case Reasoning(text):
                item = self._item("reasoning", events)
                self._delta("response.reasoning_text.delta", item, text, events)
            case ToolCall():
                self._close(events)
                self._open_call(part, events)
            case Arguments(_, text):
                self._text.append(text)
                event = "response.function_call_arguments.delta"
                events.append(self._event(event, **self._where(), delta=text))

    def _item(self, kind: str, events: list[bytes]) -> Item:
        """The open item if it is of this kind, else a new one."""
        if self._is_open and self._output[-1]["type"] == kind:
            return self._output[-1]
        self._close(events)
        item: Item
        if kind == "message":
            item = {
                "id": self._new_id("msg"),
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": self._new_id("rs"), "type": "reasoning", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open(item, events)
        events.append(self._event("response.content_part.added", **self._content(), part=part))
        return item

    def _delta(self, event: str, item: Item, text: str, events: list[bytes], **fields: Any) -> None:
        self._text.append(text)
        events.append(self._event(event, **self._content(), delta=text, **fields))

    def _open_call(self, call: ToolCall, events: list[bytes]) -> None:
        self._open(
            {
                "id": self._new_id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
            },
            events,
        )

    def _open(self, item: Item, events: list[bytes]) -> None:
        self._output.append(item)
        self._is_open, self._text = True, []
        index = len(self._output) - 1
        events.append(self._event("response.output_item.added", output_index=index, item=item))

    def _close(self, events: list[bytes]) -> None:
        """Complete the open item, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item, text = self._output[-1], "".join(self._text)
        done = self._event
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                events.append(
                    done(
                        "response.function_call_arguments.done",
                        **self._where(),
                        name=item["name"],
                        arguments=text,
                    )
                )
            case "message":
                part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
                item["content"] = [part]
                events.append(
                    done("response.output_text.done", **self._content(), text=text, logprobs=[])
                )
                events.append(done("response.content_part.done", **self._content(), part=part))
            case "reasoning":
                part = {"type": "reasoning_text", "text": text}
                item["content"] = [part]
                events.append(done("response.reasoning_text.done", **self._content(), text=text))
                events.append(done("response.content_part.done", **self._content(), part=part))
        if "status" in item:
            item["status"] = "completed"
        index = len(self._output) - 1
        events.append(done("response.output_item.done", output_index=index, item=item))

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _content(self) -> dict[str, Any]:
        return {**self._where(), "content_index": 0}

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._suffix}{len(self._output):02x}"

    def _event(self, type: str, **fields: Any) -> bytes:
        body = json_event({"type": type, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: " + type.encode() + b"\ndata: " + body + b"\n\n"
