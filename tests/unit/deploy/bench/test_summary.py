"""What is made of aiperf's export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.config import BenchConfig
from serving.deploy.bench.samples import Sample
from serving.deploy.bench.summary import comparison_table, summarise
from serving.errors import OperatorError
from unit.deploy.bench.target_fixture import TARGET


def export(folder: Path, rows: list[dict[str, Any]]) -> None:
    latencies = {"avg": 20.0, "p50": 19.0, "p90": 30.0, "p99": 40.0}
    (folder / "profile_export_aiperf.json").write_text(
        json.dumps(
            {
                "time_to_first_token": latencies,
                "inter_token_latency": latencies,
                "request_latency": latencies,
                "output_token_throughput": {"avg": 500.0},
                "request_throughput": {"avg": 5.0},
                "benchmark_duration": {"avg": 2.0},
                "error_summary": [{"error_details": {}, "count": 3}],
            }
        )
    )
    (folder / "profile_export.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def request(start_ns: int, ttft_ms: float) -> dict[str, Any]:
    metrics = {"time_to_first_token": {"value": ttft_ms}, "request_latency": {"value": 90.0}}
    return {"metadata": {"request_start_ns": start_ns}, "metrics": metrics}


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    failed = {"metadata": {"request_start_ns": 1}, "metrics": {}, "error": {"code": 500}}
    export(tmp_path, [request(5_000_000_000, 11.0), failed, request(4_000_000_000, 12.0)])
    samples = [Sample(0, 0, 0, {"a": 10.0}, {}), Sample(2, 90, 0, {"a": 110.0}, {"a": 25.0})]
    summary, requests = summarise(tmp_path, TARGET, BenchConfig(name="[run] 1"), samples)
    assert (summary.requests, summary.errors) == (2, 3)
    assert summary.ttft_ms["p99"] == 40.0
    assert (summary.output_tokens_per_s, summary.hit_rate) == (500.0, 0.25)
    assert requests == [
        {"start_s": 1.0, "ttft_ms": 11.0, "latency_ms": 90.0},
        {"start_s": 0.0, "ttft_ms": 12.0, "latency_ms": 90.0},
    ]
    head, row = comparison_table([summary])
    assert head.index("hits") == row.index("25%")
    assert row.startswith("[run] 1")


def test_a_run_without_an_answer_fails(tmp_path: Path) -> None:
    export(tmp_path, [])
    with pytest.raises(OperatorError, match="no request was answered"):
        summarise(tmp_path, TARGET, BenchConfig(), [Sample(0, 0, 0, {}, {})])
