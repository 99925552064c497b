"""`/v1/responses` over a model that thinks and calls a tool."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import httpx
import pytest
from serving.frontend.api.responses.store import ResponseStore
from unit.frontend.agents.thinking_model import (
    RESPONSES,
    events,
    prompt_of,
)
from unit.frontend.fakes import FakePipeline


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


async def test_answer_is_complete_where_it_cannot_be_stored(
    client: httpx.AsyncClient, responses: ResponseStore, tmp_path: Path
) -> None:
    assert responses.is_enabled
    stored = (await client.post("/v1/responses", json=RESPONSES)).json()
    writer = sqlite3.connect(tmp_path / "responses.sqlite", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    answer = await client.post("/v1/responses", json=RESPONSES)
    assert (answer.status_code, answer.json()["store"]) == (200, False)
    writer.execute("ROLLBACK")
    writer.execute("DROP TABLE responses")
    writer.close()
    answer = await client.post("/v1/responses", json=RESPONSES)
    assert (answer.status_code, answer.json()["store"]) == (200, False)
    assert (await client.get(f"/v1/responses/{stored['id']}")).status_code == 503


def test_database_that_cannot_be_opened_turns_storing_off(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_text("no database " * 100)
    assert not ResponseStore(path, 1024, 1.0).is_enabled


async def test_response_that_hits_its_limit_is_incomplete(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/responses", json={**RESPONSES, "max_output_tokens": 5})).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_response_repeats_only_a_user_that_the_request_names(
    client: httpx.AsyncClient,
) -> None:
    """The specification has no null there."""
    assert "user" not in (await client.post("/v1/responses", json=RESPONSES)).json()
    named = await client.post("/v1/responses", json={**RESPONSES, "user": "me"})
    assert named.json()["user"] == "me"


@pytest.mark.parametrize("value", [str(10**30), "[" * 250 + "]" * 250])
async def test_request_that_a_response_cannot_repeat_is_refused(
    client: httpx.AsyncClient, pipeline: FakePipeline, value: str
) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "x": "VALUE"}}
    body = json.dumps({**RESPONSES, "tools": [tool]}).replace('"VALUE"', value)
    response = await client.post("/v1/responses", content=body)
    assert response.status_code == 400, response.text
    assert not pipeline.seen


async def test_response_without_usage_has_no_such_field(client: httpx.AsyncClient) -> None:
    """The specification has no null there."""
    first, *_, last = events(await client.post("/v1/responses", json={**RESPONSES, "stream": True}))
    assert "usage" not in first["response"]
    assert last["response"]["usage"]["output_tokens"] > 0


async def test_response_repeats_only_what_the_specification_allows(
    client: httpx.AsyncClient,
) -> None:
    function = {**RESPONSES["tools"][0], "description": 5, "odd": 1}
    format = {"type": "json_schema", "schema": {"type": "object"}}
    body = {
        **RESPONSES,
        "tools": [{"type": "file_search", "ranking_options": {"ranker": None}}, function],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [None]},
        "reasoning": {"effort": "some", "summary": "odd"},
        "text": {"format": format},
    }
    response = (await client.post("/v1/responses", json=body)).json()
    plain = {**RESPONSES["tools"][0], "description": None, "strict": None}
    assert response["tools"] == [plain]
    assert response["tool_choice"]["tools"] == []
    assert response["reasoning"] == {"effort": None, "summary": None}
    assert response["text"]["format"] == {**format, "name": "answer", "strict": None}
