"""Models, health, readiness, metrics, and the log line of a request."""

from __future__ import annotations

import logging

import httpx
import pytest
from unit.frontend.fakes import MODEL, FakePipeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


async def test_models_are_listed_and_found_by_name(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model == {
        "id": MODEL,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "serving",
        "max_model_len": 256,
        "max_input_tokens": 256,
        "type": "model",
        "display_name": MODEL,
        "created_at": "2023-11-14T22:13:20Z",
        "tool_parser": "json",
        "tool_parser_reason": "the chat template renders no tools",
        "reasoning_parser": "none",
        "reasoning_parser_reason": "the chat template has no markers for reasoning",
    }
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (MODEL, MODEL, False)
    assert (await client.get(f"/v1/models/{MODEL}")).json() == model
    assert (await client.get("/v1/models/org%2Ftiny")).json() == model


async def test_health_has_the_launch_id(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok", "launch_id": "launch-1"}


async def test_ready_has_the_reason_when_not_ready(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    response = await client.get("/ready")
    assert response.status_code == 200
    answers = {
        "tool_parser": "json",
        "tool_parser_reason": "the chat template renders no tools",
        "reasoning_parser": "none",
        "reasoning_parser_reason": "the chat template has no markers for reasoning",
    }
    assert response.json() == {
        "ready": True,
        "reason": "",
        "topology": "disagg",
        "instances": [],
        "answers": answers,
    }
    pipeline.reason = "no decode worker"
    response = await client.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "no decode worker"


async def test_not_ready_while_the_tokenizer_cannot_be_loaded(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    assert pipeline.card is not None
    pipeline.card = type(pipeline.card)(
        **{f: getattr(pipeline.card, f) for f in pipeline.card.__struct_fields__}
        | {"tokenizer_dir": "/nowhere"}
    )
    response = await client.get("/ready")
    assert response.status_code == 503
    assert "/nowhere/tokenizer.json" in response.json()["reason"]


async def test_each_request_writes_one_log_line(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving.frontend")
    response = await client.post("/v1/chat/completions", json=CHAT)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "serving.frontend"]
    assert line.startswith(response.json()["id"])
    for part in (f"model={MODEL}", "instances=prefill-0", "cached_tokens=3", "ttft_ms=",
                 "finish_reason=stop", "status=200"):  # fmt: skip
        assert part in line


async def test_metrics_count_served_requests(client: httpx.AsyncClient) -> None:
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", content=b"{")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    page = response.text
    for line in (
        'serving_requests_total{endpoint="chat.completions",finish_reason="stop",status="200"} 1.0',
        'serving_requests_total{endpoint="chat.completions",finish_reason="error",status="400"} 1.0',
        "serving_time_to_first_token_seconds_count 1.0",
        "serving_e2e_request_latency_seconds_count 1.0",
        "serving_cached_tokens_total 3.0",
        "serving_requests_in_flight 0.0",
        "serving_requests_queued 0.0",
    ):
        assert line in page
