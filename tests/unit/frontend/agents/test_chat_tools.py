"""Tools and reasoning on `/v1/chat/completions`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer
from unit.frontend.agents.thinking_model import (
    CHAT,
    MESSAGES,
    PARAMETERS,
    RESPONSES,
    WEATHER,
    events,
    prompt_of,
)
from unit.frontend.fakes import FakePipeline


async def test_chat_answer_has_reasoning_text_and_calls(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    body = (await client.post("/v1/chat/completions", json=CHAT)).json()
    (choice,) = body["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me look."
    assert message["reasoning_content"] == message["reasoning"] == "Where is it?"
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 3}
    assert 0 < body["usage"]["completion_tokens_details"]["reasoning_tokens"] < 40
    assert '"name": "get_weather"' in prompt_of(pipeline)


async def test_chat_stream_tells_a_call_while_it_is_generated(client: httpx.AsyncClient) -> None:
    stream = events(await client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    deltas = [choice["delta"] for event in stream for choice in event["choices"]]
    assert "".join(d.get("content") or "" for d in deltas) == "Let me look."
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "Where is it?"
    calls = [call for d in deltas for call in d.get("tool_calls", [])]
    assert calls[0]["id"].startswith("call_")
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    pieces = [call["function"]["arguments"] for call in calls[1:]]
    assert len(pieces) > 5, "arguments arrive token by token"
    assert json.loads("".join(pieces)) == {"city": "Oslo", "days": 3}
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


NAMED: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {**CHAT, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ),
    (
        "/v1/responses",
        {**RESPONSES, "tool_choice": {"type": "function", "name": "get_weather"}},
    ),
    ("/v1/messages", {**MESSAGES, "tool_choice": {"type": "tool", "name": "get_weather"}}),
]


@pytest.mark.parametrize(("path", "body"), NAMED, ids=["chat", "responses", "messages"])
async def test_tool_required_by_name_is_called_once(
    client: httpx.AsyncClient, pipeline: FakePipeline, path: str, body: dict[str, Any]
) -> None:
    assert (await client.post(path, json=body)).status_code == 200
    guide = pipeline.seen[-1].sampling.guide
    assert guide is not None
    eos = pipeline.tokenizer.token_to_id("<|im_end|>")
    llt = LLTokenizer(
        pipeline.tokenizer.to_str(), n_vocab=pipeline.tokenizer.get_vocab_size(), eos_token=eos
    )
    matcher = LLMatcher(llt, LLMatcher.grammar_from_lark(guide.text), log_level=0)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
    ids = pipeline.tokenizer.encode(call, add_special_tokens=False).ids
    assert matcher.consume_tokens(ids), matcher.get_error()
    assert matcher.is_accepting()
    more = pipeline.tokenizer.encode("\n" + call, add_special_tokens=False).ids
    assert matcher.validate_tokens(more) == 0


async def test_without_tools_a_call_is_text(client: httpx.AsyncClient) -> None:
    body = {key: value for key, value in CHAT.items() if key != "tools"}
    for fields in (body, {**CHAT, "tool_choice": "none"}):
        choice = (await client.post("/v1/chat/completions", json=fields)).json()["choices"][0]
        assert "<tool_call>" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


async def test_histories_of_agents_reach_the_template(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": "{}"}},
        {"role": "function", "name": "g", "content": "43"},
    ]
    response = await client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert response.status_code == 200, response.text
    prompt = prompt_of(pipeline)
    assert (
        '<think>Hm.</think><tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>' in prompt
    )
    assert "<|im_start|>tool\n42" in prompt
    assert "<|im_start|>tool\n43" in prompt


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
    ],
)
async def test_required_call_is_guided(
    client: httpx.AsyncClient, pipeline: FakePipeline, choice: Any
) -> None:
    body = {**CHAT, "tool_choice": choice}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    guide = pipeline.seen[-1].sampling.guide
    assert guide is not None
    assert "get_weather" in guide.text


async def test_strict_tool_is_guided_and_closed(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    assert (
        await client.post("/v1/chat/completions", json={**CHAT, "tools": [strict]})
    ).status_code == 200
    guide = pipeline.seen[-1].sampling.guide
    assert guide is not None
    assert '"additionalProperties": false' in guide.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
            "tools[0].function.parameters",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "nonsense"}},
                    }
                ],
            },
            "tools",
        ),
    ],
)
async def test_bad_tools_are_named(client: httpx.AsyncClient, fields: Any, param: str) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_guide_of_the_answer_lets_the_model_think_first(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    body = {key: value for key, value in CHAT.items() if key != "tools"}
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
    response = await client.post("/v1/chat/completions", json={**body, "response_format": format})
    assert response.status_code == 200, response.text
    guide = pipeline.seen[-1].sampling.guide
    assert guide is not None
    assert "</think>" in guide.text


async def test_reasoning_ends_when_its_budget_is_used_up(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("<think>" + "on and on " * 40 + "</think>Yes.")
    body = {**CHAT, "thinking_budget": 8, "max_tokens": 2000}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    first, second = pipeline.seen
    assert len(first.token_ids) < len(second.token_ids)
    assert second.num_generated == len(second.token_ids) - len(first.token_ids)
    ending = pipeline.tokenizer.decode(second.token_ids[-second.num_generated :])
    assert ending.startswith("<think>on")
    assert ending.endswith("\n</think>\n\n")
    assert second.sampling.max_tokens == 2000 - second.num_generated
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"].startswith("on")
    # The scripted model says its whole text again; none of it is reasoning any more.
    assert message["content"].endswith("Yes.")
    assert pipeline.aborted == [first.request_id]


async def test_deeply_nested_request_is_the_callers_error(client: httpx.AsyncClient) -> None:
    depth = 250
    schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
    function = f'{{"name": "f", "strict": true, "parameters": {schema}}}'
    body = json.dumps({**CHAT, "tools": [{"type": "function", "function": "FUNCTION"}]})
    response = await client.post(
        "/v1/chat/completions", content=body.replace('"FUNCTION"', function)
    )
    assert response.status_code == 400, response.text
    assert "nested too deeply" in response.json()["error"]["message"]
