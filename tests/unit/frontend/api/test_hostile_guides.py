"""A guide that does harm to whoever compiles it costs its own request, and no other."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving.errors import InvalidRequest
from serving.protocol import EngineOutput, ErrorInfo
from unit.frontend.fakes import MODEL, FakePipeline
from unit.frontend.scripted_workers import ScriptedWorker, pipeline_over

RULES = "\n".join(f'r{i}: r{i + 1} "x"' for i in range(2676))
HOSTILE: list[dict[str, Any]] = [
    {"guided_grammar": f'start: r0\n{RULES}\nr2676: "y"'},
    {"guided_json": {"type": "integer", "multipleOf": 99_999_989}},
    {"guided_regex": "a{1000000}"},
    {"guided_grammar": 'start: a\na: a a | "x" | a a a'},
    {"structured_outputs": {"json": {"$ref": "#"}}},
]


async def test_stream_flows_while_hostile_guides_are_compiled(
    url: str, pipeline: FakePipeline
) -> None:
    pipeline.endless, pipeline.delay_s = True, 0.002
    ask = {"model": MODEL, "prompt": "a", "max_tokens": 200}
    gaps: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        warm = {**ask, "guided_regex": "a", "stream": True}
        async with client.stream("POST", "/v1/completions", json=warm) as response:
            assert response.status_code == 200  # the process that checks guides runs
        async with client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            answers = asyncio.gather(
                *(client.post("/v1/completions", json={**ask, **guide}) for guide in HOSTILE)
            )
            last = time.monotonic()
            while not answers.done():
                await anext(lines)
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
    for guide, answer in zip(HOSTILE, await answers, strict=True):
        assert answer.status_code == 400, guide
        error = json.loads(answer.content)["error"]
        assert error["code"] == "invalid_grammar"
        assert error["param"] in (*guide, "structured_outputs.json")
    gaps.sort()
    assert len(gaps) > 50
    assert gaps[int(len(gaps) * 0.9)] < 0.05


async def test_errors_of_callers_do_not_open_the_breaker_of_a_worker(tmp_path: Path) -> None:
    caused = ErrorInfo.from_error(InvalidRequest("no", param="guided_json", code="invalid_grammar"))
    worker = ScriptedWorker((0, EngineOutput("r", [], "error", error=caused)))
    async with pipeline_over(tmp_path, worker) as connected:
        for _ in range(5):
            with pytest.raises(InvalidRequest) as caught:
                await connected.answer()
            assert (caught.value.param, caught.value.code) == ("guided_json", "invalid_grammar")
        assert connected.distrusted() == []
        assert len(worker.requests) == 5
