"""API keys: which requests are admitted, how often, and the errors for the others."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from serving.errors import OperatorError
from serving.frontend.http.api_keys import ApiKeys, read_keys
from starlette.applications import Starlette
from unit.frontend.fakes import MODEL

COMPLETION = {"model": MODEL, "prompt": "hello", "max_tokens": 2}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def guarded(app: Starlette, clock: Clock) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(ApiKeys(app, ["one", "two"], 2, clock))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_health_needs_no_key(guarded: httpx.AsyncClient) -> None:
    assert (await guarded.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic one"},
        bearing("on"),
        bearing("one two"),
        bearing("onf"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/ready", "/metrics", "/v1/models", "/v1/completions", "/no", "/health/", "//health"]
)
async def test_without_a_key_everything_else_is_401(
    guarded: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    method = "POST" if path == "/v1/completions" else "GET"
    response = await guarded.request(method, path, headers=headers, json=COMPLETION)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_request_with_a_key_is_served(guarded: httpx.AsyncClient, scheme: str) -> None:
    headers = {"authorization": f"{scheme} two"}
    response = await guarded.post("/v1/completions", headers=headers, json=COMPLETION)
    assert response.status_code == 200
    assert (await guarded.get("/no", headers=headers)).status_code == 404


async def test_each_key_has_its_own_limit(guarded: httpx.AsyncClient, clock: Clock) -> None:
    async def post(key: str) -> httpx.Response:
        return await guarded.post("/v1/completions", headers=bearing(key), json=COMPLETION)

    assert [(await post("one")).status_code for _ in range(3)] == [200, 200, 429]
    refused = await post("one")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "30"
    assert (await post("two")).status_code == 200
    assert (await guarded.get("/v1/models", headers=bearing("one"))).status_code == 200
    clock.now += 30
    assert [(await post("one")).status_code for _ in range(2)] == [200, 429]
    clock.now += 3600
    assert [(await post("one")).status_code for _ in range(3)] == [200, 200, 429]


def test_key_file_has_one_key_per_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\none\n\n  two  \n")
    assert read_keys(str(file)) == ["one", "two"]
    file.write_text("# nobody\n")
    with pytest.raises(OperatorError, match="no API key"):
        read_keys(str(file))
    with pytest.raises(OperatorError, match="cannot be read"):
        read_keys(str(tmp_path / "absent"))
