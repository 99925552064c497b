"""What a scripted model that thinks and calls a tool is asked, and what it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
from unit.frontend.fakes import MODEL, FakePipeline

ANSWER = (
    "<think>\nWhere is it?\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Oslo?"}], "tools": [WEATHER]}
RESPONSES = {
    "model": MODEL,
    "input": "Oslo?",
    "tools": [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
}
MESSAGES = {
    "model": MODEL,
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "Oslo?"}],
    "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
}


def prompt_of(pipeline: FakePipeline) -> str:
    ids = pipeline.seen[-1].token_ids
    return str(pipeline.tokenizer.decode(ids, skip_special_tokens=False))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]
