"""Every benchmark can start: it answers `--help`, and what it imports exists."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
OURS = ("serving", "benchmarks", "integration", "unit", "kv_ends", "kv_contract")
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "ArgumentParser" in path.read_text()]


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) for each name that a file imports from our own modules, wherever in it."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        if node.module.split(".")[0] in OURS
        for alias in node.names
    }


# In one process, because most of the time goes into the same imports.
ASK_ALL = """
import contextlib, io, json, runpy, sys, traceback
answers = {}
for script in sys.argv[1:]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        sys.argv = [script, "--help"]
        path = sys.path[:]
        sys.path.insert(0, script.rpartition("/")[0])
        try:
            runpy.run_path(script, run_name="__main__")
            told.write("it went on")
        except SystemExit as end:
            told.write("" if not end.code else f"it ended with {end.code}")
        except BaseException:
            traceback.print_exc()
        sys.path[:] = path
    answers[script] = told.getvalue()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each script says to `--help`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=FOLDER.parents[1],
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_explains_its_options(script: Path, answers: dict[str, str]) -> None:
    answer = answers[str(script)]
    assert "usage:" in answer, answer
    assert "it ended with" not in answer


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_names_that_a_benchmark_imports_exist(path: Path) -> None:
    missing = []
    for module, name in sorted(imported(path)):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert not missing
