"""A scripted stand-in for the service's API: it behaves, except for what it is told to break."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

BLOCK_SIZE = 16


class FakeService:
    """Knobs are names in `broken`; state is what `/ready` shows."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.seen: set[str] = set()
        self.running = self.leaked = self.kv_bytes = self.transfers = 0
        self.failures = 1 if "old failure" in self.broken else 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/ready", self.ready),
                Route("/v1/models", self.models),
                Route("/metrics", self.metrics),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    def row(self, role: str, **more: Any) -> dict[str, Any]:
        running = self.running + self.leaked if role == "decode" else 0
        return {
            "instance_id": f"{role}-0",
            "role": role,
            "epoch": 1,
            "num_running": running,
            "num_waiting": 0,
            "active_blocks": 4 * running,
            "cached_blocks": 3,
            "synchronised": "events" not in self.broken,
            "kv_bytes_received": 0,
            "kv_transfers": 0,
            "kv_transfer_failures": 0,
            "local_prefill_fallbacks": 0,
            "kv_route": "tcp",
            "kv_transport": "tcp" if "transport" in self.broken else "ucx",
            **more,
        }

    async def ready(self, request: Request) -> Response:
        up = "ready" not in self.broken
        decode = self.row(
            "decode",
            kv_bytes_received=self.kv_bytes,
            kv_transfers=self.transfers,
            kv_transfer_failures=self.failures,
        )
        held = 4 if "held" in self.broken else 0
        body = {
            "ready": up,
            "reason": "" if up else "no decode worker is registered",
            "topology": "disagg_router",
            "model": "m",
            "policy": "kv",
            "instances": [self.row("prefill", active_blocks=held), decode],
            "refused": {"decode-1": "block_size 32, not 16"} if "refused" in self.broken else {},
        }
        return JSONResponse(body, status_code=200 if up else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}] if "models" not in self.broken else []})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            "# TYPE serving_kv_transfer_bytes counter\n"
            f'serving_kv_transfer_bytes_total{{instance="decode-0",transport="ucx"}} {self.kv_bytes}\n'
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["messages"][0]["content"]
        if "overload" in self.broken:
            error = {"message": "every worker is full", "type": "overloaded"}
            return JSONResponse({"error": error}, status_code=503)
        if "transfer" not in self.broken:
            self.kv_bytes += 1000
            self.transfers += 1
        if "fallback" in self.broken:
            self.failures += 1
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        hit = prompt in self.seen and "cache" not in self.broken
        self.seen.add(prompt)
        usage = {
            "prompt_tokens": 40,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2 * BLOCK_SIZE if hit else 0},
        }
        choice = {"message": {"content": self.text()}, "finish_reason": "length"}
        return JSONResponse({"choices": [choice], "usage": usage})

    def text(self) -> str:
        return "" if "empty" in self.broken else "a b c"

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        def event(delta: dict[str, str], finish: str | None = None) -> str:
            choices = [{"delta": delta, "finish_reason": finish}]
            return f"data: {json.dumps({'choices': choices})}\n\n"

        self.running += 1
        try:
            yield event({"role": "assistant", "content": ""})
            pieces = ["a ", "c", " b"] if "order" in self.broken else ["a ", "b", " c"]
            for piece in pieces:
                yield event({"content": piece})
            while body.get("ignore_eos"):  # a long one, until the caller leaves
                await asyncio.sleep(0.02)
                yield event({"content": "x"})
            yield event({}, "stop")
            usage = {"choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 3}}
            yield f"data: {json.dumps(usage)}\n\n"
            if "done" not in self.broken:
                yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            if "leak" in self.broken and body.get("ignore_eos"):
                self.leaked += 1


@contextlib.asynccontextmanager
async def serving(fake: FakeService) -> AsyncIterator[str]:
    """The fake on a loopback port of its own; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:  # noqa: ASYNC110 -- uvicorn offers no event for it
                await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
