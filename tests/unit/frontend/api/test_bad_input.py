"""Whatever a client sends, it gets a 4xx with an OpenAI error object, and nothing is left."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from unit.frontend.fakes import MODEL, FakePipeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": MODEL, "prompt": "hello"}
PATHS = ("/v1/chat/completions", "/v1/completions")


def check_error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    error: dict[str, Any] = body["error"]
    return error


async def refuse(
    client: httpx.AsyncClient, path: str, body: Any, param: str | None, code: str | None = None
) -> None:
    error = check_error(await client.post(path, json=body))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\x00\x01\x02",
        b"{'model': 1}",
        b'{"model": "m"} trailing',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\ud800 and more text after it"}',
        b'{"model": "\\udc00\\ud800"}',
        b'{"model": "a\x00b"}',
        b'{"model": NaN}',
        b"[" * 100_00,
        b'{"metadata":' * 5000,
        b"\xef\xbb\xbf{}",
    ],
)
async def test_malformed_json_is_refused(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    check_error(await client.post(path, content=body))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("model", None),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "1"),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", "1"),
        ("n", 0),
        ("n", 129),
        ("n", 9),  # more than max_inflight
        ("stop", 1),
        ("stop", ["x"] * 17),
        ("stop", "\0"),
        ("min_tokens", -1),
        ("min_tokens", 200),
        ("ignore_eos", "yes"),
        ("stream", "yes"),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"1000": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", [5]),
        ("response_format", "json"),
        ("response_format", {"type": "json_schema"}),
        ("guided_json", 5),
        ("guided_json", '{"type":'),
        ("guided_json", {"type": "strin"}),
        ("guided_json", {"type": "object", "properties": 5}),
        ("guided_json", {"$ref": "#/$defs/none"}),
        ("guided_json", {"type": "array", "uniqueItems": True}),
        ("guided_regex", ""),
        ("guided_regex", "(a"),
        ("guided_regex", "(?=a)b"),
        ("guided_choice", []),
        ("guided_choice", [""]),
        ("guided_choice", "yes"),
        ("guided_grammar", "root ::= missing"),
        ("guided_regex", r"a[^\s\S]b"),
        ("guided_json", {"$ref": "#"}),
        ("structured_outputs", {"regex": 5}),
        ("guided_grammar", "start: missing"),
        ("user", 5),
    ],
)
async def test_value_out_of_range_or_of_the_wrong_type_names_its_field(
    client: httpx.AsyncClient, pipeline: FakePipeline, path: str, field: str, value: Any
) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), "max_tokens": 100, field: value}
    error = check_error(await client.post(path, json=body))
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0].split("[")[0] == field
    assert not pipeline.seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "name": "\0", "content": "x"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        (
            {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
            "tools[0].function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nothing"}},
                }
            },
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "guided_regex",
        ),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
    ],
)
async def test_bad_chat_field_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    await refuse(client, "/v1/chat/completions", {**CHAT, **fields}, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 1}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [[1, 10**30]]}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 9}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
    ],
)
async def test_bad_completion_field_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    await refuse(client, "/v1/completions", {**COMPLETION, **fields}, param)


async def test_guide_that_does_not_compile_is_refused_with_the_reason(
    client: httpx.AsyncClient,
) -> None:
    for fields, reason in (
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_grammar": "start: missing"}, "unknown name"),
    ):
        error = check_error(await client.post(PATHS[0], json={**CHAT, **fields}))
        assert error["code"] == "invalid_grammar"
        assert reason in error["message"]
        assert "<state>" not in error["message"]


async def test_missing_fields_are_named(client: httpx.AsyncClient) -> None:
    required = "missing_required_parameter"
    messages = CHAT["messages"]
    await refuse(client, "/v1/chat/completions", {"messages": messages}, "model", required)
    await refuse(client, "/v1/chat/completions", {"model": MODEL}, "messages", required)
    await refuse(client, "/v1/completions", {"prompt": "hello"}, "model", required)


async def test_unknown_field_is_ignored(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    body = {**CHAT, "cache_salt": 1, "messages": [{"role": "user", "content": "x", "foo": 1}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert len(pipeline.seen) == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (PATHS[0], {**CHAT, "messages": [{"role": "user", "content": "x y " * 300}]}, "messages"),
        (PATHS[0], {**CHAT, "messages": [{"role": "user", "content": "x" * 60_000}]}, "messages"),
        (PATHS[0], {**CHAT, "max_tokens": 250}, "messages"),
        (PATHS[1], {**COMPLETION, "prompt": "x y " * 300}, "prompt"),
        (PATHS[1], {**COMPLETION, "prompt": [5] * 256}, "prompt"),
        (PATHS[1], {**COMPLETION, "max_tokens": 256}, "prompt"),
    ],
)
async def test_more_than_the_context_is_refused_with_both_numbers(
    client: httpx.AsyncClient, path: str, body: Any, param: str
) -> None:
    error = check_error(await client.post(path, json=body))
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert "256" in error["message"]


async def test_default_max_tokens_is_cut_to_what_fits(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    response = await client.post("/v1/completions", json={**COMPLETION, "prompt": [5] * 250})
    assert response.status_code == 200
    assert pipeline.seen[0].sampling.max_tokens == 6


@pytest.mark.parametrize("path", PATHS)
async def test_unknown_model_is_404(client: httpx.AsyncClient, path: str) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), "model": "gpt-\0-4"}
    error = check_error(await client.post(path, json=body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_unknown_route_model_and_wrong_method_have_error_objects(
    client: httpx.AsyncClient,
) -> None:
    check_error(await client.get("/v1/nothing"), 404)
    check_error(await client.get("/v1/models/other"), 404)
    check_error(await client.get("/v1/models/%00"), 404)
    response = await client.get("/v1/chat/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    check_error(await client.post("/v1/models", json={}), 405)


async def test_body_over_the_limit_is_413(client: httpx.AsyncClient) -> None:
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 70_000}]})
    for path in PATHS:
        error = check_error(await client.post(path, content=body.encode()), 413)
        assert error["code"] == "request_too_large"


async def test_bad_input_reaches_no_worker_and_leaves_nothing(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    for path in PATHS:
        for body in (b"{", b'{"model":1}', json.dumps({**CHAT, "n": 0}).encode()):
            check_error(await client.post(path, content=body))
    assert not pipeline.seen
    assert "serving_requests_in_flight 0.0" in (await client.get("/metrics")).text
