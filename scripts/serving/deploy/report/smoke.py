"""Does the running service keep its promises? Eight short checks against its API.

Nothing is simulated and nothing is remembered. Prompts are new in each run, so the first use of a
prompt is cold and the second is not.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from serving.console import coloured
from serving.deploy.report.service_client import ServiceClient, ServiceFailed
from serving.deploy.report.service_spec import ServiceSpec
from serving.errors import OperatorError
from serving.progress import Report

NUM_AT_ONCE = 8
MOST_NAMES = 16
REPORT_S = 10.0
"""Loads and counters reach the frontend with the workers' reports, at least once a second."""
EVENTS_S = 0.5
"""Cache events of an answer reach the router within this time."""
_SOME_TEXT = {"min_tokens": 4}
"""Without it, a model may end its answer at once."""


class CheckOutcome(Struct, frozen=True):
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    seconds: float


class Smoke:
    """The checks, in the order they run. Each returns its detail or raises ServiceFailed."""

    def __init__(
        self, service: ServiceClient, spec: ServiceSpec, report_s: float, events_s: float
    ) -> None:
        self._service, self._spec = service, spec
        self._report_s, self._events_s = report_s, events_s
        self._before: dict[str, dict[str, Any]] = {}

    def checks(self) -> list[tuple[str, Callable[[], Awaitable[str]]]]:
        transfer = [("kv transfer", self.kv_transfer)] if self._spec.disaggregated else []
        return [
            ("ready", self.ready),
            ("models", self.models),
            ("chat", self.chat),
            ("stream", self.stream),
            ("prefix cache", self.prefix_cache),
            *transfer,
            (f"{NUM_AT_ONCE} at once", self.at_once),
            ("abort", self.abort),
        ]

    async def ready(self) -> str:
        state = await self._service.ready()
        if not state["ready"]:
            raise ServiceFailed(f"not ready: {state.get('reason') or 'no reason given'}")
        self._before = _by_instance(state)
        names = ", ".join(self._before)
        if len(self._before) > MOST_NAMES:
            names = f"{len(self._before)} instances"
        noise = "; dummy weights: answers are noise" if state.get("dummy_weights") else ""
        return f"{state['topology']}, policy {state['policy']}: {names}{noise}"

    async def models(self) -> str:
        name = await self._service.first_model()
        return f"{name}, context of {self._service.max_model_len} tokens"

    async def chat(self) -> str:
        answer = await self._service.chat(_sentence(), 16, **_SOME_TEXT)
        return _check_answer(answer)

    async def stream(self) -> str:
        """Chunks arrive one by one, in order, and the stream ends with [DONE]."""
        prompt = _sentence()
        texts: list[str] = []
        finish: list[str] = []
        usage: dict[str, Any] = {}
        last = ""
        started = time.monotonic()
        first_s = 0.0
        more = {**_SOME_TEXT, "stream_options": {"include_usage": True}}
        async with self._service.stream(prompt, 16, **more) as events:
            async for last in events:
                if last == "[DONE]":
                    break
                chunk = json.loads(last)
                if "error" in chunk:
                    raise ServiceFailed(f"error in the stream: {chunk['error']['message']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    if choice["delta"].get("content"):
                        first_s = first_s or time.monotonic() - started
                        texts.append(choice["delta"]["content"])
                    if choice["finish_reason"]:
                        finish.append(choice["finish_reason"])
        if last != "[DONE]":
            raise ServiceFailed("the stream ended without [DONE]")
        if len(finish) != 1 or not texts or not usage.get("completion_tokens"):
            raise ServiceFailed(
                f"{len(texts)} chunks, finish reasons {finish}, usage {usage or 'missing'}"
            )
        whole = (await self._service.chat(prompt, 16, **_SOME_TEXT))["choices"][0]["message"][
            "content"
        ]
        if self._spec.exact and whole != "".join(texts):
            raise ServiceFailed(f"streamed {''.join(texts)!r}, but at once it is {whole!r}")
        return f"{len(texts)} chunks, the first after {first_s:.2f} s, [DONE]"

    async def prefix_cache(self) -> str:
        """A prompt of several blocks, then the same again: blocks of the first are reused."""
        state = await self._service.ready()
        prompt = long_prompt(self._spec.block_size, self._service.max_model_len)
        cold = cached_tokens(await self._service.chat(prompt, 4))
        # A policy that ignores the cache comes back to the first worker only after the others.
        repeats = 1 if state["policy"] == "kv" else 2 * len(state["instances"])
        warm = cold
        for _ in range(repeats):
            await asyncio.sleep(self._events_s)
            warm = max(warm, cached_tokens(await self._service.chat(prompt, 4)))
            if warm >= cold + self._spec.block_size:
                return f"cached tokens: {cold} the first time, {warm} the second"
        raise ServiceFailed(f"cached tokens: {cold} the first time, {warm} when repeated")

    async def kv_transfer(self) -> str:
        """KV blocks went from prefill to decode workers, by the configured transport."""
        transport = self._spec.transport
        state = await self._until(lambda state: self._grown(state, "kv_bytes_received") > 0)
        num_bytes, transfers, failures, fallbacks = (
            self._grown(state, name)
            for name in (
                "kv_bytes_received",
                "kv_transfers",
                "kv_transfer_failures",
                "local_prefill_fallbacks",
            )
        )
        if num_bytes <= 0:
            raise ServiceFailed(
                f"no KV bytes arrived at a decode worker ({fallbacks} local prefills instead)"
            )
        used = {row["kv_transport"] for row in state["instances"] if row["kv_bytes_received"]}
        if used != {transport}:
            raise ServiceFailed(
                f"KV was transferred over {', '.join(sorted(used))}, not {transport}"
            )
        exported = await self._service.samples("serving_kv_transfer_bytes_total")
        if not any(v for labels, v in exported.items() if dict(labels)["transport"] == transport):
            raise ServiceFailed(f"/metrics counts no bytes with transport {transport}")
        if failures or fallbacks:
            raise ServiceFailed(f"{failures} transfers failed, {fallbacks} local prefills")
        routes = {row["kv_route"] for row in state["instances"] if row["kv_bytes_received"]}
        route = f" ({', '.join(sorted(routes))})" if any(routes) else ""
        return f"{num_bytes / 1e6:.1f} MB in {transfers} transfers over {transport}{route}"

    async def at_once(self) -> str:
        answers = await asyncio.gather(
            *(self._service.chat(_sentence(), 8, **_SOME_TEXT) for _ in range(NUM_AT_ONCE))
        )
        for answer in answers:
            _check_answer(answer)
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        return f"{NUM_AT_ONCE} answers, {tokens} tokens"

    async def abort(self) -> str:
        """Closing a stream frees its blocks on every worker, although it had long to go."""
        idle = await self._until(lambda state: _held(state) == (0, 0))
        if _held(idle)[0]:
            return "skipped: others use the service, so their blocks hide the ones of this check"
        if _held(idle)[1]:
            raise ServiceFailed(f"blocks are held although no request runs: {_holders(idle)}")
        async with self._service.stream(_sentence(), None, ignore_eos=True) as events:
            async for event in events:
                if event == "[DONE]":
                    raise ServiceFailed("the stream was over before it could be closed")
                if '"content"' in event:
                    break
            busy = _held(await self._until(lambda state: _held(state)[0] > 0))
            if not busy[0]:
                raise ServiceFailed("no worker reported the running request")
        started = time.monotonic()
        after = await self._until(lambda state: _held(state) == (0, 0))
        if _held(after) != (0, 0):
            raise ServiceFailed(
                f"{self._report_s:g} s after the stream was closed {_held(after)[0]} requests still run; "
                f"blocks held: {_holders(after)}"
            )
        return f"{busy[1]} blocks free again after {time.monotonic() - started:.2f} s"

    async def _until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The body of `/ready` as soon as `holds` accepts it, or the last one after `report_s`."""
        deadline = time.monotonic() + self._report_s
        while True:
            state = await self._service.ready()
            if holds(state) or time.monotonic() > deadline:
                return state
            await asyncio.sleep(0.1)

    def _grown(self, state: dict[str, Any], name: str) -> int:
        """How much a counter grew over all instances since `ready`. A restarted one began at 0."""
        grown = 0
        for instance, row in _by_instance(state).items():
            before = self._before.get(instance, {})
            same = before.get("epoch") == row["epoch"]
            grown += row[name] - (before[name] if same else 0)
        return grown


async def run_smoke(
    spec: ServiceSpec, report: Report, report_s: float = REPORT_S, events_s: float = EVENTS_S
) -> list[CheckOutcome]:
    """Run the checks and report each as it ends. When `ready` or `models` fails, it stops.

    `report_s` bounds the wait for counters, `events_s` is the wait for cache events.
    """
    outcomes: list[CheckOutcome] = []
    async with ServiceClient(spec.url, spec.headers, spec.tls_cert_file) as service:
        report(f"smoke test of {spec.url}")
        for name, check in Smoke(service, spec, report_s, events_s).checks():
            started = time.monotonic()
            try:
                detail, ok = await check(), True
            except ServiceFailed as exc:
                detail, ok = str(exc), False
            outcome = CheckOutcome(name, ok, detail, time.monotonic() - started)
            outcomes.append(outcome)
            verdict = "ok" if ok else "FAILED"
            padding = " " * (8 - len(verdict))
            report(f"  {coloured(verdict)}{padding}{name:<14}{outcome.seconds:6.2f} s  {detail}")
            if not ok and name in ("ready", "models"):
                break
    return outcomes


def conclude_smoke(outcomes: list[CheckOutcome], report: Report) -> None:
    """Raises OperatorError with the first reason when a check failed."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        names = ", ".join(outcome.name for outcome in failed)
        raise OperatorError(
            f"smoke test failed ({names}): {failed[0].detail}",
            remedy="`snakemake doctor` looks for the cause; the programs' logs are in logs/",
        )
    report(f"smoke test passed: {len(outcomes)} checks in {sum(o.seconds for o in outcomes):.1f} s")


def _by_instance(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["instance_id"]: row for row in state["instances"]}


def _held(state: dict[str, Any]) -> tuple[int, int]:
    """Running and waiting requests, and the blocks they hold, over all instances."""
    rows = state["instances"]
    return (
        sum(row["num_running"] + row["num_waiting"] for row in rows),
        sum(row["active_blocks"] for row in rows),
    )


def _holders(state: dict[str, Any]) -> str:
    rows = _by_instance(state).items()
    return ", ".join(f"{name} {row['active_blocks']}" for name, row in rows if row["active_blocks"])


def cached_tokens(answer: dict[str, Any]) -> int:
    details = answer["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _check_answer(answer: dict[str, Any]) -> str:
    """A chat completion that has text, a finish reason and counts."""
    choice, usage = answer["choices"][0], answer["usage"]
    text = choice["message"]["content"]
    if not text or choice["finish_reason"] not in ("stop", "length"):
        raise ServiceFailed(f"answered {text!r} with finish_reason {choice['finish_reason']!r}")
    return f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens: {text[:40]!r}"


def _word() -> str:
    return "".join(random.choice("bdfgklmnprst") + random.choice("aeiou") for _ in range(2))


def _sentence() -> str:
    """A short, new prompt. It starts with new words, so it shares no block with another prompt."""
    return f"{_word()} {_word()} {_word()}: write a few words about the sea."


def long_prompt(block_size: int, max_model_len: int) -> str:
    """A new prompt of several blocks that fits the context, whether a token is a word or a character."""
    num_chars = min(max(800, 20 * block_size), max_model_len // 2)
    return " ".join(_word() for _ in range(num_chars // 5))
