"""Folders with odd names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving.deploy.planning.shell_word import ShellWord, quote_interpreter, require_usable_paths
from serving.errors import OperatorError


@pytest.mark.parametrize(
    "name", ["a b", "it's", "100%", "$HOME", "caf\u00e9", 'a "b"', "a;b", "#1"]
)
def test_formatted_path_is_one_word_of_the_shell(name: str, tmp_path: Path) -> None:
    program = tmp_path / name / "program"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho ran $1\n")
    program.chmod(0o755)
    word = ShellWord(program)
    done = subprocess.run(
        ["bash", "-c", f"{word} once"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "ran once\n"
    assert Path(word) == program


def test_interpreter_is_quoted_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/plain/python")
    quote_interpreter()
    assert type(sys.executable) is str
    monkeypatch.setattr(sys, "executable", "/a b/python")
    quote_interpreter()
    assert f"{sys.executable} x" == "'/a b/python' x"
    assert sys.executable == "/a b/python"


@pytest.mark.parametrize("name", ["{x}", "a ;b", "a\nb", "a'b\"c"])
def test_path_that_cannot_be_written_down_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(OperatorError, match="move it into a folder"):
        require_usable_paths(Path("/checkout"), Path("/data") / name)


def test_other_paths_are_accepted() -> None:
    require_usable_paths(Path("/a b/it's 100%"), Path('/\u00fcber "quoted"'))
