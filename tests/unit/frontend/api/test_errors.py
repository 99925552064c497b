"""What goes wrong behind the frontend, as its clients see it."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from serving.errors import (
    DeadlineExceeded,
    EngineFailed,
    InstanceLost,
    InvalidRequest,
    KvTransferFailed,
    NoInstances,
    Overloaded,
    QueuedTooLong,
)
from unit.frontend.fakes import MODEL, FakePipeline

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
CASES = [
    (Overloaded("full", retry_after_s=2.5), 503, "overloaded", "3"),
    (QueuedTooLong("waited", retry_after_s=1.5), 503, "overloaded", "2"),
    (NoInstances("none"), 503, "no_instances", "1"),
    (InstanceLost("decode-0"), 503, "instance_lost", "1"),
    (DeadlineExceeded("prefill", 5), 504, "deadline_exceeded", None),
    (EngineFailed("bad"), 500, "engine_failed", None),
    (KvTransferFailed("r", "prefill-0", "why"), 500, "internal_error", None),
    (InvalidRequest("no", code="odd"), 400, "odd", None),
    (ZeroDivisionError("secret"), 500, "internal_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "retry_after"), CASES)
async def test_error_before_the_first_token_has_its_status_code(
    client: httpx.AsyncClient,
    pipeline: FakePipeline,
    error: Exception,
    status: int,
    code: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    pipeline.fail_after, pipeline.error = 0, error
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["x-request-id"].startswith("chatcmpl-")
    assert "secret" not in response.text


async def test_error_after_the_first_token_ends_the_stream_without_done(
    client: httpx.AsyncClient, pipeline: FakePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serving.frontend")
    pipeline.fail_after, pipeline.error = 2, InstanceLost("decode-0")
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    *chunks, last = response.text.strip().split("\n\n")
    assert chunks
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "instance_lost"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "serving.frontend"]
    assert "finish_reason=error status=200" in line


async def test_error_after_the_first_token_fails_a_whole_response(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.fail_after, pipeline.error = 2, InstanceLost("decode-0")
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503


async def test_one_failed_sample_aborts_the_others(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.fail_after, pipeline.error = 2, InstanceLost("decode-0")
    response = await client.post("/v1/chat/completions", json={**CHAT, "n": 4})
    assert response.status_code == 503
    assert pipeline.active == 0


@pytest.mark.parametrize("finish_reason", ["cancelled", "error"])
async def test_request_that_its_worker_cancelled_or_failed_is_an_error(
    client: httpx.AsyncClient, pipeline: FakePipeline, finish_reason: str
) -> None:
    pipeline.finish_reason = finish_reason  # type: ignore[assignment]
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"


async def test_without_a_worker_requests_get_503_and_the_model_is_still_listed(
    client: httpx.AsyncClient, pipeline: FakePipeline
) -> None:
    pipeline.card = None
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["id"] == MODEL
