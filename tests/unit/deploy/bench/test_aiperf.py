"""The command line of aiperf, and the tokenizer that it finds without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.config import BenchConfig
from serving.deploy.bench.aiperf import aiperf_command, tokenizer_home
from unit.deploy.bench.target_fixture import TARGET


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_a_trace_is_replayed_at_its_times() -> None:
    config = BenchConfig(trace="x", seed=3)
    command = aiperf_command(
        Path("/env/bin/python"),
        TARGET,
        config,
        Path("out"),
        Path("cut"),
        {"authorization": "Bearer k"},
    )
    assert command[:2] == ["/env/bin/aiperf", "profile"]
    assert option(command, "--input-file") == "cut"
    assert "--fixed-schedule" in command
    assert "--concurrency" not in command
    assert option(command, "--random-seed") == "3"
    assert option(command, "--header") == "authorization:Bearer k"


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
def test_a_synthetic_load_has_its_options(
    more: dict[str, Any], there: dict[str, str], not_there: list[str]
) -> None:
    config = BenchConfig(seed=1, **more)
    command = aiperf_command(Path("/env/bin/python"), TARGET, config, Path("out"), None, {})
    assert {name: option(command, name) for name in there} == there
    assert not set(not_there) & set(command)
    assert option(command, "--request-count") == "100"


def test_the_tokenizer_is_found_offline_and_weights_are_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "engine"
    source.mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        (source / name).write_text(name)
    home = tokenizer_home(source, tmp_path / "home")
    repository = home / "hub" / "models--service--model"
    revision = (repository / "refs" / "main").read_text()
    found = {path.name for path in (repository / "snapshots" / revision).iterdir()}
    assert found == {"tokenizer.json", "config.json"}
