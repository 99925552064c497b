"""What sub-processes of a Snakemake run learn from its main process, without environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.config import parse
from serving.deploy.planning import run_state
from unit.deploy.resolved import resolve_for_test

READ = (
    "from serving.deploy.planning.run_state import config_of_main_process\n"
    "config = config_of_main_process()\n"
    "print(config and (config.topology, config.frontend.port))"
)
KEEP_AND_END = (
    "import pathlib\n"
    "from unit.deploy.resolved import resolve_for_test\n"
    "from serving.config import Config\n"
    "from serving.deploy.planning.run_state import keep_for_subprocesses\n"
    "keep_for_subprocesses(resolve_for_test(Config()))\n"
    "print(len(list(pathlib.Path('.snakemake').iterdir())))"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*command: str) -> str:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return done.stdout.strip()


def test_grandchild_finds_the_configuration_of_the_main_process(folder: Path) -> None:
    config = resolve_for_test(parse({"frontend": {"port": 8123}}), "agg_router")
    run_state.keep_for_subprocesses(config)
    # Snakemake starts sub-processes through a shell.
    assert run("sh", "-c", '"$0" -c "$1"; exit 0', sys.executable, READ) == "('agg_router', 8123)"


def test_process_without_such_an_ancestor_finds_nothing(folder: Path) -> None:
    (folder / ".snakemake").mkdir()
    (folder / ".snakemake" / "resolved-999999999.json").write_text("{}")
    assert run(sys.executable, "-c", READ) == "None"


def test_configuration_is_removed_when_the_main_process_ends(folder: Path) -> None:
    assert run(sys.executable, "-c", KEEP_AND_END) == "1"
    assert list((folder / ".snakemake").iterdir()) == []


def test_failures_are_taken_once(folder: Path) -> None:
    (folder / ".snakemake").mkdir()
    run_state.failures_file().write_text("no room\n  -> make some\0no port\0")
    assert run_state.take_failures() == ["no room\n  -> make some", "no port"]
    assert run_state.take_failures() == []
