"""`/v1/messages` over a model that thinks and calls a tool."""

from __future__ import annotations

import json

import httpx
import pytest
from unit.frontend.agents.thinking_model import (
    MESSAGES,
    PARAMETERS,
    events,
    prompt_of,
)
from unit.frontend.fakes import FakePipeline


async def test_message_has_blocks_of_each_kind(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/messages", json=MESSAGES)).json()
    assert body["type"] == "message"
    assert body["stop_reason"] == "tool_use"
    thinking, text, call = body["content"]
    assert thinking["thinking"] == "Where is it?"
    assert thinking["signature"]
    assert text == {"type": "text", "text": "Let me look."}
    assert (call["type"], call["name"]) == ("tool_use", "get_weather")
    assert call["input"] == {"city": "Oslo", "days": 3}
    assert body["usage"]["cache_read_input_tokens"] == 3
    assert body["usage"]["output_tokens"] > 0


async def test_message_stream_opens_and_closes_each_block(client: httpx.AsyncClient) -> None:
    stream = events(await client.post("/v1/messages", json={**MESSAGES, "stream": True}))
    assert [e["type"] for e in stream[:2]] == ["message_start", "ping"]
    assert stream[0]["message"]["usage"]["input_tokens"] > 0
    blocks: dict[int, list[str]] = {}
    for event in stream:
        if event["type"].startswith("content_block"):
            blocks.setdefault(event["index"], []).append(event["type"].split("_")[-1])
    assert sorted(blocks) == [0, 1, 2]
    for kinds in blocks.values():
        assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("start", "stop", {"delta"})
    deltas = [event["delta"] for event in stream if event["type"] == "content_block_delta"]
    json_text = "".join(d["partial_json"] for d in deltas if d["type"] == "input_json_delta")
    assert json.loads(json_text) == {"city": "Oslo", "days": 3}
    assert stream[-2]["delta"]["stop_reason"] == "tool_use"
    assert stream[-1] == {"type": "message_stop"}


async def test_message_histories_and_stop_sequences(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("one END two")
    body = {
        **MESSAGES,
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "stop_sequences": ["END"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Oslo?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "O"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "Rain"}],
                    },
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
    }
    answer = (await client.post("/v1/messages", json=body)).json()
    assert answer["stop_reason"] == "stop_sequence"
    assert answer["stop_sequence"] == "END"
    assert answer["content"] == [{"type": "text", "text": "one "}]
    prompt = prompt_of(pipeline)
    order = ["Be kind.", "Oslo?", "<think>Hm.", '{"city": "O"}', "tool\nRain", "And?"]
    assert [prompt.index(text) for text in order] == sorted(prompt.index(text) for text in order)
    counted = await client.post("/v1/messages/count_tokens", json=body)
    assert counted.json() == {"input_tokens": len(pipeline.seen[-1].token_ids)}


async def test_message_errors_have_the_shape_of_that_api(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/messages", json={**MESSAGES, "max_tokens": None})
    assert response.status_code == 400
    assert response.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "`max_tokens` is required"},
    }
    response = await client.post("/v1/messages", json={**MESSAGES, "model": "other"})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")


async def test_message_has_the_form_of_its_output_config(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    format = {"type": "json_schema", "schema": PARAMETERS}
    body = {key: value for key, value in MESSAGES.items() if key != "tools"}
    body |= {"output_config": {"format": format, "effort": "low"}}
    assert (await client.post("/v1/messages", json=body)).status_code == 200
    guide = pipeline.seen[-1].sampling.guide
    assert guide is not None
    assert '"additionalProperties":false' in guide.text.replace(": ", ":")
    bad = {**body, "output_config": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}
    response = await client.post("/v1/messages", json=bad)
    assert response.status_code == 400, response.text


NESTED = "[" * 300 + "]" * 300


@pytest.mark.parametrize("arguments", [f'{{"a": {10**30}}}', f'{{"a": {NESTED}}}'])
async def test_arguments_that_cannot_be_written_again_are_no_failure(
    client: httpx.AsyncClient, pipeline: FakePipeline, arguments: str
) -> None:
    pipeline.say(f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>')
    response = await client.post("/v1/messages", json={**MESSAGES, "max_tokens": 2000})
    assert response.status_code == 200, response.text
    (block,) = response.json()["content"]
    assert block["type"] == "tool_use"
    assert block["input"] in ({"a": 1e30}, {})
