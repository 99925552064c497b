"""Sizes of modules and folders, how test modules share code, and the words that are used."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scripts" / "serving"
TESTS = ROOT / "tests"

MAX_LINES = 400
MAX_MODULES = 15
LARGE_FOLDERS = {
    "scripts": 25,  # one short script for each rule
    "tests/benchmarks": 20,  # one script for each thing that is measured
}
"""Folders that may hold more modules, and how many."""

LEFT_BEHIND = {
    r"\bcarriers?\b": "transport",
    r"\bsent_log\b": "decision_log",
    r"\bretired?\b": "stop programs that no longer belong",
    r"\bsay\(": "report(",
    r"\bwho has none\b": "the name of what is missing",
    r"\bpatience\b": "stream deadline, or expire",
    r"\blean.layers?\b|\bfusion\b": "layer rewrite",
    r"\bgiv(e|es|ing) up\b|\bgive_up\b": "expire, or what happens then",
    r"\bsaid\b|\btold\b": "reported",
    r"\bnews\b": "update",
    r"\btelling\b": "reporting",
    r"\bwhat is told\b": "the name of what is reported",
}
"""What was once written (a regular expression, in any case), and what is written now."""


def sources(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_modules_are_short() -> None:
    lengths = {
        name(path): path.read_text(encoding="utf-8").count("\n")
        for path in sources(ROOT / "scripts", TESTS)
    }
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_folders_hold_few_modules() -> None:
    modules: defaultdict[str, int] = defaultdict(int)
    for path in sources(ROOT / "scripts", TESTS):
        modules[name(path.parent)] += path.name != "__init__.py"
    assert not {
        folder: count
        for folder, count in modules.items()
        if count > LARGE_FOLDERS.get(folder, MAX_MODULES)
    }


def imported(path: Path) -> set[str]:
    """Full names of everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def test_no_test_module_imports_another() -> None:
    """Tests share code in modules that are named for what they hold."""
    test_modules = {path.stem for path in sources(TESTS) if path.stem.startswith("test_")}
    sharing = {
        name(path)
        for path in sources(TESTS)
        if any(test_modules & set(each.split(".")) for each in imported(path))
    }
    assert not sharing


def test_one_class_name_means_one_thing() -> None:
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources(PACKAGE):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name(path))
    assert not {title: paths for title, paths in homes.items() if len(paths) > 1}


def test_words_that_were_left_behind_stay_away() -> None:
    files = [
        *sources(ROOT / "scripts"),
        *(ROOT / "rules").glob("*.smk"),
        ROOT / "Snakefile",
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "config").rglob("*.md"),
        *(ROOT / "config").rglob("*.yaml"),
    ]
    found = [
        f"{name(path)}:{number}: {match.group()!r}; the word is: {instead}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, instead in LEFT_BEHIND.items()
        if (match := re.search(word, line, re.IGNORECASE))
    ]
    assert not found, "\n".join(found)
