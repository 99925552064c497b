"""openai: chat, a stream, tools with and without streaming, and `parse`."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel
from weather import BASE_URL, MODEL, QUESTION, SCHEMA, get_weather, report

TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


class City(BaseModel):
    name: Literal["Paris", "Oslo"]
    is_capital: bool


client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
messages: list[Any] = [{"role": "user", "content": QUESTION}]


def ask(**more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=32, temperature=0, **more
    )


text = ask().choices[0].message.content
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))

message = ask(tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0].message
[call] = message.tool_calls
result = get_weather(**json.loads(call.function.arguments))
messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
answer = ask(tools=[TOOL], tool_choice="none").choices[0].message.content

named = {"type": "function", "function": {"name": "get_weather"}}
with client.chat.completions.stream(
    model=MODEL,
    messages=messages[:1],
    tools=[TOOL],
    tool_choice=named,
    max_tokens=48,
    temperature=0,
) as stream:
    kinds = {event.type for event in stream}
    [streamed_call] = stream.get_final_completion().choices[0].message.tool_calls
get_weather(**json.loads(streamed_call.function.arguments))

parsed = client.chat.completions.parse(
    model=MODEL, messages=messages[:1], response_format=City, max_tokens=48, temperature=0
)
report(
    text=text,
    streamed=streamed,
    answer=answer,
    kinds=sorted(kinds),
    parsed=parsed.choices[0].message.parsed.name,
    models=[model.id for model in client.models.list()],
)
