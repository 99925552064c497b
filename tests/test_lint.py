"""The repository's style, checked by the tools that define it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

CHECKS = {
    "ruff-format": [str(BIN / "ruff"), "format", "--check", "."],
    "ruff": [str(BIN / "ruff"), "check", "."],
    "mypy": [str(BIN / "mypy"), "--strict", "scripts/serving"],
    "snakefmt": [str(BIN / "snakefmt"), "--check", "Snakefile", "rules"],
    "snakemake-lint": [str(BIN / "snakemake"), "--lint"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_clean(name: str) -> None:
    command = CHECKS[name]
    if not Path(command[0]).exists():
        pytest.fail(f"{command[0]} is missing: pip install -e '.[test]'")
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": "scripts"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
