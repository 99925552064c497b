"""Tools, reasoning and the three protocols over one scripted model that thinks and calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from unit.frontend.fakes import MODEL, TOOL_TEMPLATE, FakePipeline, make_card, write_tokenizer

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


@pytest.fixture
def pipeline(tmp_path: Path) -> FakePipeline:
    folder = write_tokenizer(tmp_path / "tokenizer", TOOL_TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fake = FakePipeline(make_card(folder, max_model_len=4096), tokenizer)
    fake.say(ANSWER)
    return fake


def prompt_of(pipeline: FakePipeline) -> str:
    ids = pipeline.seen[-1].token_ids
    return str(pipeline.tokenizer.decode(ids, skip_special_tokens=False))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


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


# --- /v1/responses -----------------------------------------------------------------------------


async def test_response_has_items_of_each_kind(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/responses", json=RESPONSES)).json()
    assert body["object"] == "response"
    assert body["status"] == "completed"
    reasoning, message, call = body["output"]
    assert reasoning["content"][0]["text"] == "Where is it?"
    assert message["content"][0] == {
        "type": "output_text",
        "text": "Let me look.",
        "annotations": [],
        "logprobs": [],
    }
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Oslo", "days": 3}
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


async def test_response_stream_has_the_events_that_clients_rely_on(
    client: httpx.AsyncClient,
) -> None:
    stream = events(await client.post("/v1/responses", json={**RESPONSES, "stream": True}))
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    kinds = [event["type"].removeprefix("response.") for event in stream]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_text.delta",
        "output_text.done",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "completed",
    ]
    final = stream[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    text = "".join(e["delta"] for e in stream if e["type"] == "response.output_text.delta")
    assert text == "Let me look."
    assert final["usage"]["output_tokens"] > 0


async def test_response_continues_an_earlier_one(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    first = (await client.post("/v1/responses", json=RESPONSES)).json()
    call = first["output"][-1]
    body = {
        **RESPONSES,
        "previous_response_id": first["id"],
        "instructions": "Be brief.",
        "input": [
            {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."},
            {"role": "user", "content": [{"type": "input_text", "text": "So?"}]},
            {"type": "web_search_call", "id": "w", "status": "completed"},
        ],
    }
    second = await client.post("/v1/responses", json=body)
    assert second.status_code == 200, second.text
    assert second.headers["x-ignored"] == "web_search_call"
    prompt = prompt_of(pipeline)
    order = ["Be brief.", "Oslo?", "Where is it?", "Let me look.", "<tool_call>", "Rain.", "So?"]
    places = [
        prompt.index(text, 300) if text == "<tool_call>" else prompt.index(text) for text in order
    ]
    assert places == sorted(places)
    fetched = await client.get(f"/v1/responses/{first['id']}")
    assert fetched.json() == first
    assert (await client.delete(f"/v1/responses/{first['id']}")).json()["deleted"] is True
    assert (await client.get(f"/v1/responses/{first['id']}")).status_code == 404
    assert (await client.post("/v1/responses", json=body)).json()["error"]["code"] == (
        "previous_response_not_found"
    )


async def test_response_that_is_not_stored_cannot_be_fetched(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/responses", json={**RESPONSES, "store": False})).json()
    assert body["store"] is False
    assert (await client.get(f"/v1/responses/{body['id']}")).status_code == 404


async def test_response_that_hits_its_limit_is_incomplete(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/responses", json={**RESPONSES, "max_output_tokens": 5})).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


# --- /v1/messages ------------------------------------------------------------------------------


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
