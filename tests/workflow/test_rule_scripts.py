"""Rule scripts call the package correctly. Each runs only as part of a whole workflow otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def test_rule_scripts_agree_with_the_types_of_the_package() -> None:
    """With the options of `test_lint`, whose run has filled mypy's cache for the package."""
    scripts = [str(path) for path in SCRIPTS]
    done = subprocess.run(
        # One module name each: the scripts are no package.
        [sys.executable, "-m", "mypy", "--strict", "--scripts-are-modules", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
