"""Progress of a download: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from serving.deploy.model.transfer_progress import TransferProgress


def transfer(console: Console) -> list[str]:
    lines: list[str] = []
    with TransferProgress("model.safetensors", 4000, lines.append, console=console) as progress:
        for done_bytes in (1000, 2000, 4000):
            progress.advance_to(done_bytes)
    return lines


def test_a_pipe_gets_plain_lines_and_no_control_characters() -> None:
    output = io.StringIO()
    (line,) = transfer(Console(file=output))
    assert line.startswith("model.safetensors: 100% of 4 kB (")
    assert output.getvalue() == ""


def test_a_terminal_gets_a_bar_and_one_line_at_the_end() -> None:
    output = io.StringIO()
    (line,) = transfer(Console(file=output, force_terminal=True, width=100, _environ={}))
    assert "100%" in line
    assert "\x1b[" in output.getvalue()
    assert "model.safetensors" in output.getvalue()


def test_no_color_is_honoured_on_a_terminal() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, _environ={"NO_COLOR": "1"})
    transfer(console)
    assert "\x1b[3" not in output.getvalue()  # 3x sets a foreground colour


def test_a_resumed_transfer_counts_its_rate_from_where_it_went_on() -> None:
    lines: list[str] = []
    with TransferProgress("x", 10**9, lines.append, done_bytes=10**9 - 1) as progress:
        progress.advance_to(10**9)
    assert "100% of 1 GB" in lines[0]
    assert "GB/s" not in lines[0]


def test_a_transfer_that_fails_takes_its_bar_away() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, _environ={})
    progress = TransferProgress("x", 100, [].append, console=console)
    with pytest.raises(ConnectionError), progress:
        raise ConnectionError
    assert output.getvalue().endswith("\x1b[2K")  # the line of the bar is cleared
