"""`snakemake bench` with the real load generator, on mock workers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from integration.deployment import Deployment, running
from integration.tiny_model import save_tiny_model

PYTHON = os.environ.get("BENCH_PYTHON", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not PYTHON, reason="set BENCH_PYTHON to a Python with envs/aiperf.txt (1.2 GB) installed"
    ),
]


def test_bench_measures_the_running_service_and_compares(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    deployment = Deployment(
        tmp_path / "mock",
        str(model),
        engine={"backend": "mock"},
        mock={"prefill_tokens_per_s": 100000, "step_s": 0.001},
    )
    load = f"max_requests: 6, concurrency: 2, input_tokens: 20, output_tokens: 8, python: {PYTHON}"
    with running(deployment, "serve_agg_router"):
        for more in ("name: first", "name: second, compare: [first]"):
            done = deployment.snakemake("bench", "--config", f"bench={{{load}, {more}}}")
    assert "first" in done.stdout
    folder = deployment.directory / "results" / "bench" / "second"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["requests"], summary["errors"]) == (6, 0)
    for plot in ("ttft", "itl", "throughput", "hit_rate"):
        assert "<svg" in (folder / f"{plot}.svg").read_text()
