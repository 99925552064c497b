"""What `snakemake status` shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving.config import Config
from serving.console import table_lines
from serving.deploy.report.service_answers import hit_rates
from serving.deploy.report.status import duration, status_lines


def test_status_without_a_deployment_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Nothing runs here" in "\n".join(status_lines(Config()))
    assert list(tmp_path.iterdir()) == []


def test_columns_are_aligned() -> None:
    assert table_lines(("a", "bb"), [("long", "x")]) == ["a     bb", "long  x"]


@pytest.mark.parametrize(("seconds", "text"), [(5, "0m 05s"), (3700, "1h 01m"), (90000, "1d 01h")])
def test_durations_are_shown_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_hit_rate_is_hits_over_routed_tokens_per_instance() -> None:
    metrics = "\n".join(
        [
            "# TYPE serving_prefix_hit_tokens counter",
            'serving_routed_prompt_tokens_total{instance="prefill-0",role="prefill"} 504.0',
            'serving_routed_prompt_tokens_total{instance="decode-0",role="decode"} 0.0',
            'serving_prefix_hit_tokens_total{instance="prefill-0",role="prefill"} 126.0',
        ]
    )
    assert hit_rates(metrics) == {"prefill-0": 0.25}
