"""Streams that follow each other without a pause, and what became of each."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Outcomes:
    """Of all requests that ended. `longest_gap_s` is the longest silence within any stream."""

    num_right: int = 0
    failures: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0

    def describe(self) -> str:
        return f"{self.num_right} right, {len(self.failures)} failed: {self.failures[:3]}"


class SteadyLoad:
    """`num_streams` at a time, of `num_tokens` each, over a few prompts. An answer is right when it
    is the text that the prompt got before the load began."""

    def __init__(self, url: str, model: str, num_streams: int, num_tokens: int) -> None:
        self._url, self._model = url, model
        self._num_streams, self._num_tokens = num_streams, num_tokens
        self._prompts = [f"Request {n} of a steady load. One two three four." for n in range(5)]
        self._expected: dict[str, str] = {}
        self._stop = threading.Event()
        self.outcomes = Outcomes()

    @contextmanager
    def running(self) -> Iterator[Outcomes]:
        """Streams run until the context ends, and then to their own end."""
        for prompt in self._prompts:
            self._expected[prompt] = asyncio.run(self._answer(prompt))
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        thread.start()
        try:
            yield self.outcomes
        finally:
            self._stop.set()
            thread.join()

    async def _answer(self, prompt: str) -> str:
        async with httpx.AsyncClient() as client:
            return await self._stream(client, prompt, Outcomes())

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits) as client, asyncio.TaskGroup() as tasks:
            for number in range(self._num_streams):
                tasks.create_task(self._repeat(client, number))

    async def _repeat(self, client: httpx.AsyncClient, number: int) -> None:
        while not self._stop.is_set():
            prompt = self._prompts[number % len(self._prompts)]
            number += 1
            began = time.monotonic()
            try:
                text = await self._stream(client, prompt, self.outcomes)
            except (httpx.HTTPError, AssertionError, ValueError) as exc:
                after = f"after {time.monotonic() - began:.1f} s"
                self.outcomes.failures.append(f"{type(exc).__name__} {exc} {after}"[:300])
                await asyncio.sleep(0.1)
                continue
            if text == self._expected[prompt]:
                self.outcomes.num_right += 1
            else:
                self.outcomes.failures.append(f"another text: {text[:80]!r}")

    async def _stream(self, client: httpx.AsyncClient, prompt: str, outcomes: Outcomes) -> str:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text, reason, last = "", None, time.monotonic()
        url = f"{self._url}/v1/completions"
        async with client.stream("POST", url, json=body, timeout=120) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code} {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                outcomes.longest_gap_s = max(outcomes.longest_gap_s, now - last)
                last = now
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise AssertionError(chunk["error"]["message"])
                text += chunk["choices"][0]["text"]
                reason = chunk["choices"][0]["finish_reason"] or reason
        assert reason == "length", f"it ended with {reason}"
        return text
