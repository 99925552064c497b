"""A frontend of two models: each request meets the parts of its own model, and no others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from serving.frontend.api.state import AppState
from serving.frontend.app import create_app
from serving.frontend.http.limits import InFlight
from serving.frontend.metrics.registry import Metrics
from serving.frontend.served.model import ServedModel, ServedModels
from tokenizers import Tokenizer
from unit.frontend.fakes import FakePipeline, make_card, write_tokenizer

NAMES = {"org/first": ("small",), 'org/"second"': ("large", "gpt-x")}
SECOND = 'org/"second"'


class NamedPipeline(FakePipeline):
    """Describes itself as a real pipeline does."""

    name = ""

    def describe(self) -> dict[str, Any]:
        return {
            "topology": "disagg",
            "model": self.name,
            "policy": "kv",
            "missing_roles": ["decode"] if self.reason else [],
            "instances": [{"instance_id": f"decode-{self.name}"}],
            "refused": {},
        }


@pytest.fixture
def pipelines(tmp_path: Path) -> dict[str, NamedPipeline]:
    """Each answers with its own text, in tokens of its own context length."""
    found = {}
    for number, name in enumerate(NAMES):
        folder = write_tokenizer(tmp_path / str(number))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        card = replace(make_card(folder, max_model_len=256 << number), name=name)
        found[name] = pipeline = NamedPipeline(card, tokenizer)
        pipeline.name = name
        pipeline.say(f"hello from {number}")
    return found


@pytest.fixture
async def models(pipelines: dict[str, Any]) -> AsyncIterator[ServedModels]:
    served = []
    for name, aliases in NAMES.items():
        metrics = Metrics(of_process=False)
        served.append(
            ServedModel(
                name=name,
                aliases=aliases,
                pipeline=pipelines[name],
                metrics=metrics,
                in_flight=InFlight(2, metrics.in_flight),
            )
        )
    models = ServedModels(served, Metrics(of_model=False))
    yield models
    await models.close()


@pytest.fixture
async def client(models: ServedModels) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(AppState(models=models, max_body_bytes=64 * 1024))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "answer"),
    [("org/first", "0"), ("small", "0"), (SECOND, "1"), ("large", "1"), ("gpt-x", "1")],
)
async def test_every_api_answers_with_the_model_that_it_was_asked_for(
    client: httpx.AsyncClient, asked: str, answer: str
) -> None:
    text = f"hello from {answer}"
    messages = [{"role": "user", "content": "hi"}]
    chat = await client.post("/v1/chat/completions", json={"model": asked, "messages": messages})
    assert chat.json()["choices"][0]["message"]["content"] == text
    plain = await client.post("/v1/completions", json={"model": asked, "prompt": "hi"})
    assert plain.json()["choices"][0]["text"] == text
    assert plain.json()["model"] == asked
    agent = {"model": asked, "messages": messages, "max_tokens": 20}
    assert (await client.post("/v1/messages", json=agent)).json()["content"][0]["text"] == text
    response = await client.post("/v1/responses", json={"model": asked, "input": "hi"})
    assert response.json()["output"][0]["content"][0]["text"] == text
    tokens = await client.post("/tokenize", json={"model": asked, "prompt": "hi"})
    assert tokens.json()["max_model_len"] == 256 << int(answer)


async def test_unknown_model_gets_404_with_the_names_of_all(client: httpx.AsyncClient) -> None:
    for path in ("/v1/completions", "/v1/embeddings"):
        answer = await client.post(path, json={"model": "other", "prompt": "hi", "input": "hi"})
        error = answer.json()["error"]
        assert answer.status_code == 404
        assert error["code"] == "model_not_found"
        assert error["message"] == (
            f"The model `other` is not served here; `org/first` and `{SECOND}` are"
        )


async def test_requests_without_a_model_are_asked_for_one(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"prompt": "hi"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert (await client.get("/tokenizer_info")).status_code == 400
    assert (await client.get("/tokenizer_info", params={"model": "large"})).status_code == 200


async def test_list_has_every_name_and_its_model(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    roots = {row["id"]: row.get("root") for row in listed}
    assert roots == {
        "org/first": None,
        "small": "org/first",
        SECOND: None,
        "large": SECOND,
        "gpt-x": SECOND,
    }
    one = (await client.get("/v1/models/gpt-x")).json()
    assert one["max_model_len"] == 512


async def test_one_model_that_is_not_ready_is_named_and_the_other_serves(
    client: httpx.AsyncClient, pipelines: dict[str, NamedPipeline]
) -> None:
    assert (await client.get("/ready")).status_code == 200
    pipelines[SECOND].reason = "no decode worker is registered"
    answer = await client.get("/ready")
    content = answer.json()
    assert answer.status_code == 503
    assert content["reason"] == f"{SECOND}: no decode worker is registered"
    assert [content["models"][name]["ready"] for name in NAMES] == [True, False]
    assert content["missing_roles"] == ["decode"]
    assert {row["instance_id"]: row["model"] for row in content["instances"]} == {
        f"decode-{name}": name for name in NAMES
    }
    own = await client.get("/ready", params={"model": "small"})
    assert own.status_code == 200
    assert own.json()["model"] == "org/first"
    assert (await client.get("/ready", params={"model": "x"})).status_code == 404


async def test_a_full_model_refuses_and_the_other_takes_requests(
    client: httpx.AsyncClient, models: ServedModels
) -> None:
    ask = {"prompt": "hi", "model": "small"}
    first, second = models
    with first.in_flight.hold(2):
        assert (await client.post("/v1/completions", json=ask)).status_code == 429
        answer = await client.post("/v1/completions", json={**ask, "model": "large"})
        assert answer.status_code == 200
        with second.in_flight.hold(2):  # refused before the body is read
            assert (await client.get("/load")).json() == {"server_load": 4}
            assert (await client.post("/v1/completions", content=b"{")).status_code == 429
    assert (await client.post("/v1/completions", json=ask)).status_code == 200


async def test_metrics_are_labelled_with_the_model_and_counted_once(
    client: httpx.AsyncClient,
) -> None:
    for model in ("small", "large", "large", "unknown"):
        await client.post("/v1/completions", json={"model": model, "prompt": "hi"})
    page = (await client.get("/metrics")).text
    counted = [line for line in page.splitlines() if line.startswith("serving_requests_total{")]
    served = 'endpoint="completions",finish_reason="stop",status="200"'
    lost = 'endpoint="completions",finish_reason="error",status="404"'
    assert counted == [
        f"serving_requests_total{{{lost}}} 1.0",
        f'serving_requests_total{{model="org/first",{served}}} 1.0',
        f'serving_requests_total{{model="org/\\"second\\"",{served}}} 2.0',
    ]
    assert page.count("# TYPE serving_requests_total ") == 1
    assert page.count("\nprocess_open_fds ") == 1
    assert 'serving_requests_in_flight{model="org/first"} 0.0' in page
    assert "\nserving_requests_in_flight 0" not in page
