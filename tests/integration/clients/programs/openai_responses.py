"""openai: the Responses API with a tool, a stored response to go on from, a stream and `parse`."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel
from weather import BASE_URL, MODEL, QUESTION, SCHEMA, get_weather, report

TOOL: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}


class City(BaseModel):
    name: Literal["Paris", "Oslo"]


client = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
first = client.responses.create(
    model=MODEL,
    instructions="Answer in one sentence.",
    input=QUESTION,
    tools=[TOOL],
    tool_choice="required",
    parallel_tool_calls=False,
    max_output_tokens=48,
    temperature=0,
)
[call] = [item for item in first.output if item.type == "function_call"]
result = get_weather(**json.loads(call.arguments))
second = client.responses.create(
    model=MODEL,
    previous_response_id=first.id,
    input=[{"type": "function_call_output", "call_id": call.call_id, "output": result}],
    max_output_tokens=24,
    temperature=0,
)
retrieved = client.responses.retrieve(second.id)

with client.responses.stream(
    model=MODEL,
    input=QUESTION,
    tools=[TOOL],
    tool_choice={"type": "function", "name": "get_weather"},
    max_output_tokens=48,
    temperature=0,
) as stream:
    events = [(event.type, event.sequence_number) for event in stream]
    [streamed_call] = stream.get_final_response().output
get_weather(**json.loads(streamed_call.arguments))

parsed = client.responses.parse(
    model=MODEL, input=QUESTION, text_format=City, max_output_tokens=48, temperature=0
)
report(
    answer=second.output_text,
    retrieved=retrieved.output_text,
    events=[kind for kind, _ in events],
    numbers=[number for _, number in events],
    parsed=parsed.output_parsed.name,
)
