"""Two frontend processes behind one port: both serve, count, and are replaced when they die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from benchmarks.running_service import RunningService
from integration.tiny_model import make
from prometheus_client.parser import text_string_to_metric_families
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model import fetch_model
from serving.engine.torch.build import build_engine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


def until(condition: Callable[[], object], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def make_service(folder: Path) -> RunningService:
    model = make(folder / "tiny")
    fetched = fetch_model(
        ModelConfig(id=str(model)), folder / "model", weights="dummy", progress=print
    )
    engine = EngineConfig(backend="mock", device="cpu", dtype="float32", weights="dummy")
    build_engine(fetched, folder / "engine", engine=engine, fingerprint="test", progress=print)
    sections: dict[str, Any] = {
        "model": {"id": str(model), "name": "tiny"},
        "engine": {"backend": "mock", "max_model_len": 1024, "kv_cache_tokens": 8192},
        "mock": {"zero_delay": True},
        "frontend": {"processes": 2},
        "workers": {"agg": 1},
    }
    return RunningService(
        folder / "service",
        folder / "engine",
        "agg_router",
        sections,
        device="cpu",
        dtype="float32",
        gpus=[],
    )


def test_both_processes_serve_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    with make_service(tmp_path) as service:
        url = f"http://127.0.0.1:{service.port}"
        parent = psutil.Process(service.pids()["frontend"])

        def get(path: str) -> httpx.Response:
            return httpx.get(url + path, timeout=15)  # a connection of its own

        def who_answers() -> set[int]:
            states = [get("/ready") for _ in range(16)]
            return {s.json()["process"] for s in states if s.status_code == 200}

        def ask() -> int:
            body = {"model": "tiny", "prompt": "One two", "max_tokens": 4}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=15).status_code

        def counted() -> dict[str, float]:
            families = text_string_to_metric_families(get("/metrics").text)
            return {
                sample.labels["process"]: sample.value
                for family in families
                for sample in family.samples
                if sample.name == "serving_requests_total"
            }

        until(lambda: who_answers() == {0, 1})
        assert {ask() for _ in range(16)} == {200}
        found = counted()
        assert set(found) == {"0", "1"}
        assert sum(found.values()) == 16
        children = {child.pid for child in parent.children()}
        assert len(children) == 2
        victim = min(children)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len({c.pid for c in parent.children()} - children) == 1)
        until(lambda: who_answers() == {0, 1})
        assert {ask() for _ in range(16)} == {200}
        children = {child.pid for child in parent.children()}
    until(lambda: not any(psutil.pid_exists(pid) for pid in children))
