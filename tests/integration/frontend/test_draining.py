"""A worker that is stopped while it generates: real processes, etcd and NATS."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
from integration.frontend.mock_service import make_service
from waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

NUM_TOKENS = 150


async def test_stopped_worker_finishes_its_stream_and_new_requests_go_to_the_other(
    tmp_path: Path,
) -> None:
    with make_service(
        tmp_path,
        mock={"prefill_tokens_per_s": 100000, "step_s": 0.02},
        workers={"agg": 2},
        frontend={"processes": 1},
    ) as service:

        def body(max_tokens: int, **fields: object) -> dict[str, object]:
            return {"model": "tiny", "prompt": "One two", "max_tokens": max_tokens} | fields

        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{service.port}", timeout=30
        ) as client:

            async def stream() -> AsyncIterator[dict[str, object]]:
                request = body(NUM_TOKENS, stream=True, ignore_eos=True)
                async with client.stream("POST", "/v1/completions", json=request) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            yield json.loads(line[6:])["choices"][0]

            def running() -> list[str]:
                rows = service.ready()["instances"]
                return [row["instance_id"] for row in rows if row["num_running"]]

            chunks = stream()
            await anext(chunks)
            await until(running)
            [busy] = running()
            worker = psutil.Process(service.pids()[f"worker-{busy}"])
            worker.send_signal(signal.SIGTERM)
            await until(lambda: len(service.ready()["instances"]) == 1)
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body(4)) for _ in range(8))
            )
            assert [answer.status_code for answer in answers] == [200] * 8
            assert worker.is_running(), "its stream still runs"
            rest = [chunk async for chunk in chunks]
        assert rest[-1]["finish_reason"] == "length"
        log = (tmp_path / "service" / "logs" / "frontend.log").read_text()
        assert "continues elsewhere" not in log
        assert f"{busy} drains: it gets no new requests" in log
