"""The fields of a response that repeat its request.

They follow OpenAI's specification even where the request did not: what it does not allow, and tools
that were ignored, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from serving.errors import InvalidRequest
from serving.frontend.api.responses.request import ResponsesRequest, ResponsesTextFormat

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SUMMARIES = ("auto", "concise", "detailed")


def check_encodable(parts: list[Any]) -> None:
    """Raises InvalidRequest for parts of a request that its response could not repeat."""
    try:
        orjson.dumps([[[parts]]])  # deeper than any event has them
    except orjson.JSONEncodeError as exc:
        raise InvalidRequest(f"The request cannot be repeated in its response: {exc}") from None


def echoed_fields(request: ResponsesRequest, stored: bool) -> dict[str, Any]:
    """With what the fields mean when the request has none."""
    reasoning = request.reasoning
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "reasoning": {
            "effort": _one_of(EFFORTS, reasoning.effort if reasoning is not None else None),
            "summary": _one_of(SUMMARIES, reasoning.summary if reasoning is not None else None),
        },
        "service_tier": "default",
        "store": stored,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": _format(request.text.format if request.text is not None else None)},
        "tool_choice": _choice(request.tool_choice),
        "tools": [
            _function(tool)
            for tool in msgspec.json.decode(request.tools) or []
            if tool.get("type", "function") == "function"
        ],
        "top_logprobs": 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        **({"user": request.user} if request.user is not None else {}),
    }


def _one_of(values: tuple[str, ...], value: str | None) -> str | None:
    return value if value in values else None


def _format(format: ResponsesTextFormat | None) -> dict[str, Any]:
    if format is None or format.type != "json_schema":
        return {"type": format.type if format is not None else "text"}
    return {
        "type": "json_schema",
        "name": format.name or "answer",
        "schema": format.schema,
        "strict": format.strict,
    }


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any]:
    match choice:
        case {"type": "allowed_tools", "mode": mode, "tools": list(tools)}:
            tools = [tool for tool in tools if isinstance(tool, dict)]
            return {"type": "allowed_tools", "mode": mode, "tools": tools}
        case {"type": "function", "name": name}:
            return {"type": "function", "name": name}
    return choice or "auto"


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    description, strict = tool.get("description"), tool.get("strict")
    return {
        "type": "function",
        "name": tool["name"],
        "description": description if isinstance(description, str) else None,
        "parameters": tool.get("parameters"),
        "strict": strict if isinstance(strict, bool) else None,
    }
