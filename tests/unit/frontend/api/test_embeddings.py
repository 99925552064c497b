"""`/v1/embeddings`: what goes to workers, and what comes back in OpenAI's form."""

from __future__ import annotations

import base64
import math
from typing import Any

import httpx
import numpy as np
import pytest
from serving.errors import InvalidRequest
from unit.frontend.fakes import MODEL, FakePipeline

PATH = "/v1/embeddings"


async def embed(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"].startswith("embd-")
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": MODEL, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_text_becomes_a_vector_of_length_one(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.vector = [3.0, 0.0, 4.0]
    answer = await embed(client, input="hello world")
    (prepared,) = pipeline.seen
    assert prepared.pooling == "last"
    assert prepared.sampling.max_tokens == 1
    num_tokens = len(prepared.token_ids)
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": pytest.approx([0.6, 0.0, 0.8])}],
        "model": MODEL,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


@pytest.mark.parametrize(
    ("given", "num_inputs"),
    [("hello", 1), (["hello", "world", "fox"], 3), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
)
async def test_every_form_of_input(
    client: httpx.AsyncClient, pipeline: FakePipeline, given: Any, num_inputs: int
) -> None:
    answer = await embed(client, input=given)
    assert [item["index"] for item in answer["data"]] == list(range(num_inputs))
    assert len(pipeline.seen) == num_inputs
    assert answer["usage"]["prompt_tokens"] == sum(len(p.token_ids) for p in pipeline.seen)
    if given == [[5, 6], [7]]:
        assert [p.token_ids for p in pipeline.seen] == [[5, 6], [7]]


async def test_dimensions_cut_and_normalize_again(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.vector = [3.0, 4.0, 12.0]
    answer = await embed(client, input="x", dimensions=2)
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])


async def test_base64_holds_the_same_numbers(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.vector = [0.1, -0.7, 0.25]
    plain = (await embed(client, input="x"))["data"][0]["embedding"]
    text = (await embed(client, input="x", encoding_format="base64"))["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(text), dtype="<f4")
    assert decoded.tolist() == np.float32(plain).tolist()
    assert math.hypot(*plain) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": 5}, "input"),
        ({}, None),
    ],
)
async def test_bad_input_is_refused_before_anything_runs(
    client: httpx.AsyncClient, pipeline: FakePipeline, body: dict[str, Any], param: str | None
) -> None:
    error = await refusal(client, **body)
    assert param is None or error["param"] == param
    assert not pipeline.seen


async def test_input_longer_than_the_context_gets_the_numbers(client: httpx.AsyncClient) -> None:
    await embed(client, input=[5] * 256)
    error = await refusal(client, input=[5] * 257)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in error["message"]
    assert "257" in error["message"]


async def test_other_models_are_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"model": "other", "input": "x"})
    assert response.status_code == 404


async def test_refusal_of_an_engine_is_the_callers_to_read(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.fail_after, pipeline.error = 0, InvalidRequest("the mock engine computes none")
    error = await refusal(client, input=["a", "b", "c"])
    assert "mock engine" in error["message"]
    assert pipeline.active == 0
