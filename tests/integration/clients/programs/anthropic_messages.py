"""anthropic: messages, a stream, tools, counted tokens and the list of models."""

from __future__ import annotations

from typing import Any

import anthropic
from weather import BASE_URL, MODEL, QUESTION, SCHEMA, get_weather, report

TOOL: Any = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}

client = anthropic.Anthropic(base_url=BASE_URL, api_key="none")
messages: list[Any] = [{"role": "user", "content": QUESTION}]
text = client.messages.create(
    model=MODEL, messages=messages, max_tokens=24, extra_body={"temperature": 0}
)
with client.messages.stream(
    model=MODEL, messages=messages, max_tokens=24, extra_body={"temperature": 0}
) as stream:
    streamed = "".join(stream.text_stream)
    streamed_usage = stream.get_final_message().usage

asked = client.messages.create(
    model=MODEL,
    system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
    messages=messages,
    max_tokens=48,
    extra_body={"temperature": 0},
    tools=[TOOL],
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
)
[call] = [block for block in asked.content if block.type == "tool_use"]
result = {
    "type": "tool_result",
    "tool_use_id": call.id,
    "content": [{"type": "text", "text": get_weather(**call.input)}],
}
messages += [
    {"role": "assistant", "content": asked.content},
    {"role": "user", "content": [result]},
]
answer = client.messages.create(
    model=MODEL,
    messages=messages,
    max_tokens=24,
    extra_body={"temperature": 0},
    tools=[TOOL],
    tool_choice={"type": "none"},
)

with client.messages.stream(
    model=MODEL,
    messages=messages[:1],
    max_tokens=48,
    extra_body={"temperature": 0},
    tools=[TOOL],
    tool_choice={"type": "tool", "name": "get_weather"},
) as stream:
    kinds = {event.type for event in stream}
    [streamed_call] = stream.get_final_message().content
get_weather(**streamed_call.input)

count = client.messages.count_tokens(model=MODEL, messages=messages[:1])
report(
    text=text.content[0].text,
    streamed=streamed,
    output_tokens=streamed_usage.output_tokens,
    stop_reason=asked.stop_reason,
    answer=answer.content[0].text,
    kinds=sorted(kinds),
    counted=count.input_tokens,
    input_tokens=text.usage.input_tokens + (text.usage.cache_read_input_tokens or 0),
    models=[model.id for model in client.models.list()],
)
