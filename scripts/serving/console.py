"""Text for a person at a terminal: tables and coloured words.

Output that goes into a pipe or file is plain and never wrapped, so that scripts and tests can read
it. On a terminal, `rich` adds colours (unless NO_COLOR is set) and wraps long cells. Nothing here
prints: callers get lines, and pass them to their progress reporter.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000
_STYLES = {
    **dict.fromkeys(("ok", "ready", "running"), "green"),
    **dict.fromkeys(("warning", "waiting", "starting"), "yellow"),
    **dict.fromkeys(("FAILED", "missing", "not ready"), "bold red"),
}


def table_lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without borders. An empty row of `titles` leaves the header out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.show_header = any(titles)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(_coloured(cell) for cell in row))
    return _lines(table)


def coloured(text: str) -> str:
    """`text` in the colour of the state or verdict that it names."""
    return "\n".join(_lines(_coloured(text)))


def without_colours(line: str) -> str:
    """The line as it belongs into a log file."""
    return Text.from_ansi(line).plain if "\x1b" in line else line


def _coloured(text: str) -> Text:
    return Text(text, style=_STYLES.get(text, ""))


def _lines(renderable: Table | Text) -> list[str]:
    on_terminal = sys.stdout.isatty()
    console = Console(
        file=io.StringIO(),
        force_terminal=on_terminal,
        width=None if on_terminal else PIPE_WIDTH,
        highlight=False,
    )
    with console.capture() as captured:
        console.print(renderable)
    return [line.rstrip() for line in captured.get().splitlines()]
