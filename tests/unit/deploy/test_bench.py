"""The benchmark around its load generator: what it is told, and what is made of its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving.config import BenchConfig
from serving.deploy.bench import run as bench
from serving.deploy.bench.samples import Sample, hit_rates, parse
from serving.errors import OperatorError

TARGET = bench.Target(
    url="http://127.0.0.1:8000",
    model="m",
    topology="agg_router",
    policy="kv",
    num_instances=2,
    max_model_len=1000,
    tokenizer_dir="/t",
)
PAGE = """# HELP serving_completion_tokens_total Tokens generated.
# TYPE serving_completion_tokens_total counter
serving_completion_tokens_total{process="0"} 30.0
serving_completion_tokens_total{process="1"} 12.0
# TYPE serving_requests_in_flight gauge
serving_requests_in_flight 3.0
# TYPE serving_routed_prompt_tokens_total counter
serving_routed_prompt_tokens_total{role="agg",instance="agg-0"} 100.0
serving_routed_prompt_tokens_total{role="agg",instance="agg-1"} 50.0
# TYPE serving_prefix_hit_tokens_total counter
serving_prefix_hit_tokens_total{role="agg",instance="agg-0"} 80.0
"""


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def lines(*requests: tuple[float, int, int]) -> str:
    keys = ("timestamp", "input_length", "output_length")
    rows = ({**dict(zip(keys, one, strict=True)), "hash_ids": [0]} for one in requests)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_metrics_page_of_several_processes_is_summed() -> None:
    sample = parse(PAGE, 1.5)
    assert (sample.at_s, sample.generated_tokens, sample.in_flight) == (1.5, 42.0, 3.0)
    assert sample.routed_tokens == {"agg-0": 100.0, "agg-1": 50.0}
    assert sample.hit_tokens == {"agg-0": 80.0}


def test_hit_rates_are_of_what_came_in_between() -> None:
    first = Sample(0, 0, 0, {"a": 100.0}, {"a": 100.0})
    last = Sample(9, 0, 0, {"a": 200.0, "b": 50.0, "idle": 0.0}, {"a": 125.0})
    assert hit_rates(first, last) == {"a": 0.25, "b": 0.0}


def test_a_trace_is_cut_to_what_the_model_takes_and_sped_up(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    trace.write_text(lines((0, 100, 10), (1000, 950, 10), (3000, 200, 10), (4000, 1, 1)))
    config = BenchConfig(trace=str(trace), speed_up=2.0, max_requests=2)
    assert bench.cut_trace(config, 1000, out) == (2, 1)
    assert [json.loads(line)["timestamp"] for line in out.read_text().splitlines()] == [0, 1500]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no trace"),
        ("hello\n", "is no trace as Mooncake"),
        ('{"timestamp": 0}\n', "is no trace as Mooncake"),
        (lines((0, 5000, 10)), "fits into 1000 tokens"),
    ],
    ids=["missing", "no JSON", "other fields", "all too long"],
)
def test_a_trace_that_cannot_be_replayed_is_one_paragraph(
    tmp_path: Path, content: str | None, why: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    if content is not None:
        trace.write_text(content)
    with pytest.raises(OperatorError, match=why):
        bench.cut_trace(BenchConfig(trace=str(trace)), 1000, tmp_path / "out")


def test_a_trace_is_replayed_at_its_times() -> None:
    config = BenchConfig(trace="x", seed=3)
    told = bench.command(
        Path("/env/bin/python"),
        TARGET,
        config,
        Path("out"),
        Path("cut"),
        {"authorization": "Bearer k"},
    )
    assert told[:2] == ["/env/bin/aiperf", "profile"]
    assert option(told, "--input-file") == "cut"
    assert "--fixed-schedule" in told
    assert "--concurrency" not in told
    assert option(told, "--random-seed") == "3"
    assert option(told, "--header") == "authorization:Bearer k"


@pytest.mark.parametrize(
    ("more", "there", "not_there"),
    [
        ({}, {"--concurrency": "8"}, ["--request-rate", "--num-prefix-prompts"]),
        ({"request_rate": 2.5}, {"--request-rate": "2.5"}, ["--concurrency"]),
        (
            {"shared_prefixes": 4},
            {"--num-prefix-prompts": "4", "--prefix-prompt-length": "256"},
            [],
        ),
    ],
    ids=["concurrency", "rate", "prefixes"],
)
def test_a_synthetic_load_is_told(
    more: dict[str, Any], there: dict[str, str], not_there: list[str]
) -> None:
    config = BenchConfig(seed=1, **more)
    told = bench.command(Path("/env/bin/python"), TARGET, config, Path("out"), None, {})
    assert {name: option(told, name) for name in there} == there
    assert not set(not_there) & set(told)
    assert option(told, "--request-count") == "100"


def test_the_tokenizer_is_found_offline_and_weights_are_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "engine"
    source.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    home = bench.offline_home(source, tmp_path / "home")
    repository = home / "hub" / "models--service--model"
    revision = (repository / "refs" / "main").read_text()
    found = {path.name for path in (repository / "snapshots" / revision).iterdir()}
    assert found == {"tokenizer.json", "config.json"}


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
    summary, requests = bench.summarise(tmp_path, TARGET, BenchConfig(), samples)
    assert (summary.requests, summary.errors) == (2, 3)
    assert summary.ttft_ms["p99"] == 40.0
    assert (summary.output_tokens_per_s, summary.hit_rate) == (500.0, 0.25)
    assert requests == [
        {"start_s": 1.0, "ttft_ms": 11.0, "latency_ms": 90.0},
        {"start_s": 0.0, "ttft_ms": 12.0, "latency_ms": 90.0},
    ]
    head, row = bench.table([summary])
    assert head.index("hits") == row.index("25%")


def test_a_run_without_an_answer_fails(tmp_path: Path) -> None:
    export(tmp_path, [])
    with pytest.raises(OperatorError, match="no request was answered"):
        bench.summarise(tmp_path, TARGET, BenchConfig(), [Sample(0, 0, 0, {}, {})])


def test_nothing_serves() -> None:
    with pytest.raises(OperatorError, match="nothing serves at"):
        bench.find_target("http://127.0.0.1:9", {}, Path("/t"), 10)
