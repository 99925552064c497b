"""What a benchmark measured: one summary of a run, and a table of several."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import BenchConfig
from serving.console import table_lines
from serving.deploy.bench.samples import Sample, hit_rates
from serving.deploy.bench.target import Target
from serving.errors import OperatorError

_TITLES = (
    *("run", "topology, policy", "requests", "failed", "TTFT p50", "p90", "p99"),
    *("ITL p50", "p99", "tokens/s", "hits"),
)
QUANTILES = ("avg", "p50", "p90", "p99")
_REQUEST_METRICS = {
    "ttft_ms": "time_to_first_token",
    "itl_ms": "inter_token_latency",
    "latency_ms": "request_latency",
}


class Summary(Struct, frozen=True):
    """One run. Latencies in ms.

    `hit_rate` is the share of prompt tokens that the chosen instance held in its prefix cache, as
    far as the router knew; `hit_rates` has it for each instance.
    """

    name: str
    when: str
    target: Target
    load: dict[str, Any]
    requests: int
    errors: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    latency_ms: dict[str, float]
    hit_rate: float
    hit_rates: dict[str, float]


def summarise(
    folder: Path, target: Target, config: BenchConfig, samples: Sequence[Sample]
) -> tuple[Summary, list[dict[str, float]]]:
    """The run as a whole, and each request: `start_s`, `ttft_ms`, `itl_ms`, `latency_ms`.

    Raises OperatorError when no request was answered.
    """
    exported = json.loads((folder / "profile_export_aiperf.json").read_text())
    rows = []
    for line in (folder / "profile_export.jsonl").read_text().splitlines():
        exported_request = json.loads(line)
        values = exported_request.get("metrics") or {}
        if "time_to_first_token" in values:
            row = {"start_s": exported_request["metadata"]["request_start_ns"] / 1e9}
            row |= {
                ours: values[name]["value"]
                for ours, name in _REQUEST_METRICS.items()
                if name in values
            }
            rows.append(row)
    if not rows:
        raise OperatorError(
            f"no request was answered: {exported.get('error_summary')}",
            remedy=f"see {folder}/logs and `snakemake status`",
        )
    begin = min(row["start_s"] for row in rows)
    rows = [{**row, "start_s": row["start_s"] - begin} for row in rows]
    first, last = samples[0], samples[-1]
    routed = sum(last.routed_tokens.values()) - sum(first.routed_tokens.values())
    hit = sum(last.hit_tokens.values()) - sum(first.hit_tokens.values())
    errors = sum(each.get("count", 1) for each in exported.get("error_summary") or [])
    return (
        Summary(
            name=config.name,
            when=time.strftime("%Y-%m-%d %H:%M:%S"),
            target=target,
            load=msgspec.to_builtins(config),
            requests=len(rows),
            errors=errors,
            duration_s=_total(exported, "benchmark_duration"),
            requests_per_s=_total(exported, "request_throughput"),
            output_tokens_per_s=_total(exported, "output_token_throughput"),
            ttft_ms=_quantiles(exported, "time_to_first_token"),
            itl_ms=_quantiles(exported, "inter_token_latency"),
            latency_ms=_quantiles(exported, "request_latency"),
            hit_rate=hit / routed if routed else 0.0,
            hit_rates=hit_rates(first, last),
        ),
        rows,
    )


def _total(exported: dict[str, Any], name: str) -> float:
    return float(exported.get(name, {}).get("avg") or 0.0)


def _quantiles(exported: dict[str, Any], name: str) -> dict[str, float]:
    return {key: float(exported.get(name, {}).get(key) or 0.0) for key in QUANTILES}


def comparison_table(summaries: Sequence[Summary]) -> list[str]:
    """Lines for people: one run a row."""
    rows = [
        (
            summary.name,
            f"{summary.target.topology}, {summary.target.policy}",
            str(summary.requests),
            str(summary.errors),
            *[f"{summary.ttft_ms[key]:,.0f} ms" for key in ("p50", "p90", "p99")],
            *[f"{summary.itl_ms[key]:,.1f} ms" for key in ("p50", "p99")],
            f"{summary.output_tokens_per_s:,.0f}",
            f"{summary.hit_rate:.0%}",
        )
        for summary in summaries
    ]
    return table_lines(_TITLES, rows)
