"""An HTTP client for the running service, for `smoke_test` and `doctor`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.config import FrontendConfig
from serving.deploy.security.api_access import client_tls
from serving.errors import ServingError

ANSWER_S = 120.0
"""An answer may take this long on a busy machine; a connection may not."""


class ServiceFailed(ServingError):
    """The service did not do what a test asked of it; the text is for a person."""


class ServiceClient:
    """An HTTP client for the API. Raises ServiceFailed with the service's own words."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        tls_cert_file: str | None = None,
    ) -> None:
        # A proxy from the environment must not come between us and loopback.
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=dict(headers or {}),
            timeout=httpx.Timeout(ANSWER_S, connect=5.0),
            trust_env=False,
            verify=client_tls(FrontendConfig(tls_cert_file=tls_cert_file)) or True,
        )
        self.url, self.model = url, ""
        self.max_model_len = 0
        """Tokens of prompt and completion that the service offers; known with the model."""

    async def __aenter__(self) -> ServiceClient:
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
            raise ServiceFailed(f"GET {self.url}{path}: {_error_text(exc)}") from exc

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
        self.max_model_len = int(models[0].get("max_model_len") or 0)
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
            raise ServiceFailed(f"chat: {_error_text(exc)}") from exc
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
            raise ServiceFailed(f"stream: {_error_text(exc)}") from exc

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


def _error_text(exc: httpx.HTTPError) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


def _message(text: str) -> str:
    """OpenAI's error message, or the start of whatever came instead."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
