"""litellm: tools, a stream, and what it makes of a prompt that is too long."""

from __future__ import annotations

import json
from typing import Any

import litellm
from weather import BASE_URL, MODEL, QUESTION, SCHEMA, get_weather, report

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
messages: list[Any] = [{"role": "user", "content": QUESTION}]


def ask(messages: list[Any], **more: Any) -> Any:
    return litellm.completion(
        model=f"openai/{MODEL}",
        api_base=f"{BASE_URL}/v1",
        api_key="none",
        messages=messages,
        max_tokens=48,
        temperature=0,
        **more,
    )


message = (
    ask(messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    .choices[0]
    .message
)
[call] = message.tool_calls
result = get_weather(**json.loads(call.function.arguments))
messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
answer = ask(messages, tools=[TOOL], tool_choice="none").choices[0].message.content
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(messages[:1], stream=True))
try:
    ask([{"role": "user", "content": "word " * 20_000}], num_retries=0)
    too_long = "accepted"
except Exception as exc:
    too_long = type(exc).__name__
report(answer=answer, streamed=streamed, too_long=too_long)
