"""The running service as its tests see it: where it is, what it should be, and how to call it.

`expected` prefers what the running programs were told (`run/*.json`) over the config, so that a
test in a second shell needs no flags. Used by `smoke` and `doctor`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from serving.config import Config, FrontendConfig
from serving.config.process import FrontendSettings, WorkerSettings, read_settings
from serving.deploy.planning.topology import address
from serving.deploy.processes.credentials import authorization, scheme, trust, with_certificate
from serving.errors import OperatorError, ServingError

ANSWER_S = 120.0
"""An answer may take this long on a busy machine; a connection may not."""


class ServiceFailed(ServingError):
    """The service did not do what a test asked of it; the text is for a person."""


class Expected(Struct, frozen=True, kw_only=True):
    """What the deployment should be. `exact`: float32, so equal prompts give equal greedy text."""

    url: str
    headers: dict[str, str] = {}
    tls_cert_file: str | None = None
    disaggregated: bool
    transport: str
    block_size: int
    max_model_len: int
    exact: bool


def expected(run_dir: Path, config: Config) -> Expected:
    """From the programs' own files in `run_dir`, or the config for what was never started."""
    frontend, workers = recorded(run_dir)
    listen = frontend.frontend if frontend else config.frontend
    engine = workers[0].engine if workers else config.engine
    transfer = workers[0].kv_transfer if workers else config.kv_transfer
    topology = frontend.topology if frontend else config.deployment.topology
    dtype = workers[0].dtype if workers else config.engine.dtype
    return Expected(
        url=f"{scheme(listen)}://{address(listen.host, listen.port)}",
        headers=authorization(listen),
        tls_cert_file=with_certificate(listen).tls_cert_file,
        disaggregated=topology.startswith("disagg"),
        transport="mock" if engine.backend == "mock" else transfer.transport,
        block_size=engine.block_size,
        max_model_len=engine.max_model_len,
        exact=dtype == "float32",
    )


def recorded(run_dir: Path) -> tuple[FrontendSettings | None, list[WorkerSettings]]:
    """What the programs were last told; nothing when none was started here.

    A file of another version of this project counts as missing.
    """
    frontend, workers = None, []
    for path in sorted(run_dir.glob("*.json")):
        try:
            if path.stem == "frontend":
                frontend = read_settings(path, FrontendSettings)
            elif path.stem.startswith("worker-"):
                workers.append(read_settings(path, WorkerSettings))
        except (OSError, msgspec.MsgspecError):
            continue
    return frontend, workers


def tokenizer_dir(run_dir: Path) -> Path:
    """Of the model that is served here. Raises OperatorError when nothing was started."""
    _, workers = recorded(run_dir)
    if not workers:
        raise OperatorError(
            "no worker was started here",
            remedy="start a service, for example `snakemake serve_agg_router`, then run this again",
        )
    return Path(workers[0].engine_dir)


class Service:
    """An HTTP client for the API. Raises ServiceFailed with the service's own words."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        tls_cert_file: str | None = None,
    ) -> None:
        # Proxies named in the environment must not get between us and loopback.
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=dict(headers or {}),
            timeout=httpx.Timeout(ANSWER_S, connect=5.0),
            trust_env=False,
            verify=trust(FrontendConfig(tls_cert_file=tls_cert_file)) or True,
        )
        self.url, self.model = url, ""

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> httpx.Response:
        try:
            return await self._client.get(path)
        except httpx.HTTPError as exc:
            raise ServiceFailed(f"GET {self.url}{path}: {_words(exc)}") from exc

    async def ready(self) -> dict[str, Any]:
        """The body of `/ready`, whether it is ready or not."""
        response = await self.get("/ready")
        try:
            body: dict[str, Any] = response.json()
            return body if body["ready"] in (True, False) else {}
        except (ValueError, KeyError, TypeError) as exc:
            raise ServiceFailed(
                f"{self.url} answers, but not as this service does ({response.status_code})"
            ) from exc

    async def first_model(self) -> str:
        """Name of the served model; requests use it from then on."""
        response = await self.get("/v1/models")
        models = response.json()["data"] if response.status_code == 200 else []
        if not models:
            raise ServiceFailed(f"/v1/models answers {response.status_code} and names no model")
        self.model = str(models[0]["id"])
        return self.model

    def _body(self, prompt: str, max_tokens: int | None, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": 0, **more}
        return body if max_tokens is None else {**body, "max_tokens": max_tokens}

    async def chat(self, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
        """A greedy chat completion, not streamed."""
        try:
            response = await self._client.post(
                "/v1/chat/completions", json=self._body(prompt, max_tokens, **more)
            )
        except httpx.HTTPError as exc:
            raise ServiceFailed(f"chat: {_words(exc)}") from exc
        if response.status_code != 200:
            raise ServiceFailed(f"chat: {response.status_code} {_message(response.text)}")
        answer: dict[str, Any] = response.json()
        return answer

    @asynccontextmanager
    async def stream(
        self, prompt: str, max_tokens: int | None, **more: Any
    ) -> AsyncIterator[AsyncIterator[str]]:
        """The data of each server-sent event of a greedy chat. Leaving closes the connection.

        Without `max_tokens` it goes on to the end of the context.
        """
        body = self._body(prompt, max_tokens, stream=True, **more)
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise ServiceFailed(f"stream: {response.status_code} {_message(text)}")
                yield _events(response)
        except httpx.HTTPError as exc:
            raise ServiceFailed(f"stream: {_words(exc)}") from exc

    async def samples(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The values of one Prometheus metric by their sorted labels."""
        response = await self.get("/metrics")
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
            if sample.name == name
        }


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()


def _words(exc: httpx.HTTPError) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


def _message(text: str) -> str:
    """OpenAI's error message, or the start of whatever came instead."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
