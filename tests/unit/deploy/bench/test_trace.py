"""A recorded workload is cut to what the served model takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving.config import BenchConfig
from serving.deploy.bench.trace import cut_trace
from serving.errors import OperatorError


def lines(*requests: tuple[float, int, int]) -> str:
    keys = ("timestamp", "input_length", "output_length")
    rows = ({**dict(zip(keys, request, strict=True)), "hash_ids": [0]} for request in requests)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_trace_is_cut_to_what_the_model_takes_and_sped_up(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    trace.write_text(lines((0, 100, 10), (1000, 950, 10), (3000, 200, 10), (4000, 1, 1)))
    config = BenchConfig(trace=str(trace), speed_up=2.0, max_requests=2)
    assert cut_trace(config, 1000, out) == (2, 1)
    assert [json.loads(line)["timestamp"] for line in out.read_text().splitlines()] == [0, 1500]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "does not exist"),
        ("hello\n", "is not a trace in the format"),
        ('{"timestamp": 0}\n', "is not a trace in the format"),
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
        cut_trace(BenchConfig(trace=str(trace)), 1000, tmp_path / "out")
