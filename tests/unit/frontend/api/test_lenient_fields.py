"""Values that OpenAI's specification allows, and fields that clients send beside it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from unit.frontend.fakes import MODEL, FakePipeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": MODEL, "prompt": "hello"}


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("prompt", [None, "", [], [[]]])
async def test_empty_prompt_begins_a_document(
    client: httpx.AsyncClient, pipeline: FakePipeline, prompt: Any
) -> None:
    await post(client, "completions", model=MODEL, prompt=prompt)
    (seen,) = pipeline.seen
    assert len(seen.token_ids) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1.0},
        {"max_tokens": 2.0},
        {"top_p": 0},
        {"stream_options": {"include_usage": True}},
        {"some_client_field": {"a": 1}},
    ],
)
async def test_values_of_the_specification_are_accepted(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    await post(client, "chat/completions", **{**CHAT, **fields})
    await post(client, "completions", **{**COMPLETION, **fields})


async def test_top_p_zero_is_greedy(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    await post(client, "chat/completions", **CHAT, top_p=0)
    assert pipeline.seen[0].sampling.temperature == 0.0


async def test_no_tokens_are_generated_when_none_are_requested(client: httpx.AsyncClient) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
        (choice,) = (await post(client, path, **{**body, "max_tokens": 0}))["choices"]
        assert choice["finish_reason"] == "length"
        assert (choice.get("text") or choice.get("message", {}).get("content") or "") == ""


async def test_bias_key_is_read_as_the_number_it_is(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "logit_bias": {"000000000001" + "0" * 12: 1}}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logit_bias"


async def test_stop_string_is_included_on_request(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("one END two")
    body = {**COMPLETION, "stop": "END"}
    (choice,) = (await post(client, "completions", **body))["choices"]
    assert choice["text"] == "one "
    (choice,) = (await post(client, "completions", **body, include_stop_str_in_output=True))[
        "choices"
    ]
    assert choice["text"] == "one END"


async def test_token_ids_are_returned_on_request(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
        answer = await post(client, path, **body, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == pipeline.token_ids
        response = await client.post(
            f"/v1/{path}", json={**body, "stream": True, "return_token_ids": True}
        )
        events = [json.loads(line[6:]) for line in response.text.split("\n") if "{" in line]
        ids = [i for event in events for c in event["choices"] for i in c.get("token_ids", [])]
        assert ids == pipeline.token_ids


async def test_usage_so_far_is_in_every_chunk_on_request(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**CHAT, "stream": True, "stream_options": options}
    response = await client.post("/v1/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in response.text.split("\n") if "{" in line]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(pipeline.token_ids)


async def test_alternatives_that_decode_alike_are_all_kept(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    """Tokens 5 and 6 are single bytes of no character: both decode to U+FFFD or to a letter."""
    pipeline.say("é")
    answer = await post(client, "completions", **COMPLETION, logprobs=3)
    logprobs = answer["choices"][0]["logprobs"]
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    for text, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[text] == value, "the chosen token keeps its own log-probability"


async def test_offsets_count_the_characters_of_the_text(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("a😀b")
    (choice,) = (await post(client, "completions", **COMPLETION, logprobs=0))["choices"]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[0] == 0
    assert set(offsets[1:-1]) == {1}, "every byte of the emoji begins where the emoji does"
    assert choice["text"][offsets[-1]] == "b"


async def test_replacement_characters_of_the_model_are_kept(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("x\ufffd")
    (choice,) = (await post(client, "completions", model=MODEL, prompt="bad \ufffd"))["choices"]
    assert choice["text"] == "x\ufffd"


async def test_too_long_prompt_is_told_in_the_words_that_clients_match(
    client: httpx.AsyncClient,
) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "x y " * 300}]}
    error = (await client.post("/v1/chat/completions", json=body)).json()["error"]
    assert "maximum context length is 256 tokens" in error["message"]
    assert "engine.max_model_len" in error["message"]
