"""Tables and coloured words: coloured on a terminal, plain and unwrapped everywhere else."""

from __future__ import annotations

import io

import pytest
from serving.console import coloured, table_lines, without_colours

LONG = "a detail " * 40


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def print_to_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called in a test, because pytest replaces standard output after its fixtures."""
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_piped_tables_are_plain_and_never_wrapped() -> None:
    assert table_lines(("a", "bb"), [("ok", LONG)]) == ["a   bb", f"ok  {LONG}".rstrip()]
    assert coloured("FAILED") == "FAILED"


def test_tables_without_titles_have_no_header() -> None:
    assert table_lines(("", ""), [("ok", "x")]) == ["ok  x"]


def test_square_brackets_are_text_and_no_markup() -> None:
    assert table_lines(("", ""), [("ok", "[DONE] [red]")]) == ["ok  [DONE] [red]"]


def test_terminal_gets_colours_and_wrapped_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    print_to_terminal(monkeypatch)
    lines = table_lines(("a", "bb"), [("ok", LONG)])
    assert "\x1b[" in coloured("ok")
    assert max(len(without_colours(line)) for line in lines) <= 60
    assert without_colours(coloured("FAILED")) == "FAILED"


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    print_to_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in coloured("ok")
