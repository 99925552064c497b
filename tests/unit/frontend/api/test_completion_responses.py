"""Shapes of successful responses, in process."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from unit.frontend.fakes import MODEL, FakePipeline

TEXT = "hello world, the fox"
USER = [{"role": "user", "content": "hello"}]
TAG = {
    "structures": [{"begin": "<call>", "schema": {"type": "object"}, "end": "</call>"}],
    "triggers": ["<call>"],
}
TAG_TEXT = json.dumps({"type": "structural_tag", **TAG}, separators=(",", ":"))


def events(text: str) -> list[Any]:
    """The decoded chunks of a complete stream."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    response = await client.post(f"/v1/{path}", json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return response


async def test_chat_completion_has_the_specified_shape(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    response = await post(client, "chat/completions", messages=USER)
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert response.headers["x-request-id"] == body["id"]
    assert body["model"] == MODEL
    assert body["system_fingerprint"] == "fp_0123456789ab"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt_tokens = len(pipeline.seen[0].token_ids)
    completion_tokens = len(pipeline.token_ids)
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_chat_stream_begins_with_role_and_ends_with_finish_reason(
    client: httpx.AsyncClient,
) -> None:
    response = await post(client, "chat/completions", messages=USER, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(c["delta"].get("content", "") for c in choices) == TEXT
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


async def test_usage_chunk_comes_last_and_only_when_asked_for(client: httpx.AsyncClient) -> None:
    for path, prompt in (
        ("chat/completions", {"messages": USER}),
        ("completions", {"prompt": "hello"}),
    ):
        response = await post(
            client, path, **prompt, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = events(response.text)
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_completion_has_the_specified_shape(client: httpx.AsyncClient) -> None:
    body = (await post(client, "completions", prompt="hello", max_tokens=100)).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    ]


async def test_completion_defaults_to_sixteen_tokens_and_chat_to_the_rest_of_the_context(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    await post(client, "completions", prompt="hello")
    await post(client, "chat/completions", messages=USER)
    completion, chat = pipeline.seen
    assert completion.sampling.max_tokens == 16
    assert chat.sampling.max_tokens == 256 - len(chat.token_ids)


async def test_every_prompt_of_a_list_gets_a_choice(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    body = (await post(client, "completions", prompt=["a", "b"], n=2, max_tokens=100)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in body["choices"]} == {TEXT}
    assert body["usage"]["prompt_tokens"] == 2  # each prompt once
    assert body["usage"]["completion_tokens"] == 4 * len(pipeline.token_ids)
    assert len({prepared.request_id for prepared in pipeline.seen}) == 4


async def test_prompts_may_be_token_ids(client: httpx.AsyncClient, pipeline: FakePipeline) -> None:
    await post(client, "completions", prompt=[5, 6, 7])
    await post(client, "completions", prompt=[[5, 6], [7]])
    assert [prepared.token_ids for prepared in pipeline.seen] == [[5, 6, 7], [5, 6], [7]]


async def test_echo_repeats_the_prompt_first(client: httpx.AsyncClient) -> None:
    body = (await post(client, "completions", prompt="so: ", echo=True, max_tokens=99)).json()
    assert body["choices"][0]["text"] == "so: " + TEXT
    response = await post(
        client, "completions", prompt="so: ", echo=True, stream=True, max_tokens=99
    )
    assert "".join(c["choices"][0]["text"] for c in events(response.text)) == "so: " + TEXT


async def test_echo_with_logprobs_covers_the_prompt_too(client: httpx.AsyncClient) -> None:
    """As evaluation harnesses read it: parallel lists over prompt and output."""
    ask: dict[str, Any] = {"prompt": "so: hello", "echo": True, "logprobs": 1, "max_tokens": 99}
    body = (await post(client, "completions", **ask)).json()
    choice = body["choices"][0]
    logprobs, num_prompt = choice["logprobs"], body["usage"]["prompt_tokens"]
    assert choice["text"] == "so: hello" + TEXT
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-0.5] * (len(logprobs["tokens"]) - 1)
    assert len(logprobs["tokens"]) == num_prompt + body["usage"]["completion_tokens"]
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    streamed = events((await post(client, "completions", stream=True, **ask)).text)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    for name, whole in logprobs.items():
        assert [entry for piece in pieces for entry in piece[name]] == whole


async def test_echo_without_a_token_to_generate_returns_the_prompt_alone(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    for prompt in ("so: hello", [5, 6, 7]):
        body = (
            await post(client, "completions", prompt=prompt, echo=True, logprobs=0, max_tokens=0)
        ).json()
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 0
        assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
        assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert {prepared.sampling.max_tokens for prepared in pipeline.seen} == {1}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type":"object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "age",
                        "strict": True,
                        "schema": {"type": "object", "properties": {"b": {}, "a": {}}},
                    },
                }
            },
            (
                "json_schema",
                '{"type":"object","properties":{"b":{},"a":{}},"additionalProperties":false}',
            ),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}},
                }
            },
            ("json_schema", '{"type":"object","properties":{}}'),
        ),
        (
            {"guided_json": {"type": "string", "format": "phone"}},
            ("json_schema", '{"type":"string"}'),
        ),
        ({"guided_json": {"type": "null"}}, ("json_schema", '{"type":"null"}')),
        ({"guided_json": ' {"type": "null"}'}, ("json_schema", '{"type":"null"}')),
        ({"guided_regex": r"\d+"}, ("regex", r"\d+")),
        ({"guided_choice": ["a|b", "1.5 (x)"]}, ("regex", r"(?:a\|b)|(?:1\.5 \(x\))")),
        ({"guided_grammar": 'start: "a"'}, ("grammar", 'start: "a"')),
        ({"structured_outputs": {"json": {"type": "null"}}}, ("json_schema", '{"type":"null"}')),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", '{"type":"object"}')),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("regex", "(?:a)|(?:b)")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, ("grammar", 'start: "a"')),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, ("structural_tag", TAG_TEXT)),
        ({"response_format": {"type": "structural_tag", **TAG}}, ("structural_tag", TAG_TEXT)),
        ({"json_schema": '{"type": "null"}'}, ("json_schema", '{"type":"null"}')),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"ebnf": 'root ::= "a"'}, ("grammar", 'root ::= "a"')),
        ({"guided_decoding_backend": "xgrammar", "guided_whitespace_pattern": " "}, None),
    ],
)
async def test_guide_reaches_the_engine(
    client: httpx.AsyncClient,
    pipeline: FakePipeline,
    path: str,
    fields: dict[str, Any],
    guide: tuple[str, str] | None,
) -> None:
    prompt = {"messages": USER} if "chat" in path else {"prompt": "a"}
    await post(client, path, **prompt, **fields)
    found = pipeline.seen[0].sampling.guide
    assert (found and (found.kind, found.text)) == guide


async def test_biases_reach_the_engine_by_token(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    await post(client, "completions", prompt="a", logit_bias={"5": -100, "007": 1.5})
    assert pipeline.seen[0].sampling.logit_bias == ((5, -100.0), (7, 1.5))


async def test_samples_of_one_prompt_stream_side_by_side_with_their_own_seeds(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    response = await post(client, "chat/completions", messages=USER, n=3, seed=7, stream=True)
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in events(response.text):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert set(texts.values()) == {TEXT}
    assert sorted(finished) == [0, 1, 2]
    assert [prepared.sampling.seed for prepared in pipeline.seen] == [7, 8, 9]


async def test_chat_logprobs_carry_bytes_and_finite_numbers(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.say("é")
    body = (
        await post(client, "chat/completions", messages=USER, logprobs=True, top_logprobs=2)
    ).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    first, second = logprobs["content"]
    assert first["token"] == "\ufffd"
    assert first["bytes"] + second["bytes"] == list("é".encode())
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -9999.0]


async def test_streamed_chat_logprobs_cover_every_token_once(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    response = await post(client, "chat/completions", messages=USER, logprobs=True, stream=True)
    tokens = [
        entry["token"]
        for chunk in events(response.text)
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert "".join(tokens) == TEXT
    assert len(tokens) == len(pipeline.token_ids)


async def test_completion_logprobs_are_parallel_lists(client: httpx.AsyncClient) -> None:
    body = (await post(client, "completions", prompt="a", logprobs=1, max_tokens=99)).json()
    logprobs = body["choices"][0]["logprobs"]
    tokens = logprobs["tokens"]
    assert "".join(tokens) == TEXT
    offsets = [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert logprobs["text_offset"] == offsets
    assert logprobs["token_logprobs"] == [-0.5] * len(tokens)
    assert logprobs["top_logprobs"] == [{token: -0.5} for token in tokens]


async def test_stop_string_ends_the_text_before_it_and_aborts_the_work(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.endless = True
    body = (await post(client, "chat/completions", messages=USER, stop=[", the"])).json()
    assert body["choices"][0]["message"]["content"] == "hello world"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert pipeline.aborted == [body["id"]]


async def test_length_is_the_finish_reason_at_max_tokens(client: httpx.AsyncClient) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = (await post(client, "chat/completions", messages=USER, **{field: 2})).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2


async def test_sampling_fields_reach_the_engine(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    await post(client, "chat/completions", messages=USER, **fields, stop_token_ids=[9])
    await post(client, "chat/completions", messages=USER, ignore_eos=True, temperature=0)
    sampled, greedy = (prepared.sampling for prepared in pipeline.seen)
    assert {name: getattr(sampled, name) for name in fields} == fields
    assert sampled.stop_token_ids == (1, 9)
    assert greedy.stop_token_ids == ()
    assert greedy.temperature == 0.0


async def test_known_fields_without_effect_are_accepted_at_their_neutral_values(
    client: httpx.AsyncClient,
) -> None:
    neutral = {
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "logit_bias": {},
        "modalities": ["text"],
        "reasoning_effort": "low",
        "prediction": None,
        "n": 1,
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "key",
        "verbosity": "low",
        "audio": None,
        "stop": None,
        "max_tokens": None,
        "stream": None,
    }
    await post(client, "chat/completions", messages=USER, **neutral)
    await post(client, "completions", prompt="a", best_of=1, suffix=None, user="me")


async def test_text_parts_and_all_roles_are_rendered(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    await post(client, "chat/completions", messages=messages)
    assert pipeline.tokenizer.decode(pipeline.seen[0].token_ids, skip_special_tokens=False) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        '<|im_start|>assistant\n{"name": "f", "arguments": {}}<|im_end|>\n'
        "<|im_start|>user\nResult of f:\n42<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
