"""Log lines have a bound."""

from __future__ import annotations

import io
import logging

from serving.frontend.log import LaterHandler, LineFormatter
from serving.log_lines import LINE_CHARS, bounded


def test_line_that_quotes_a_request_of_megabytes_is_cut_in_its_middle() -> None:
    written = io.StringIO()
    handler = LaterHandler(written)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    handler.emit(
        logging.LogRecord("x", logging.WARNING, "", 1, "%s", ("a" * 3_600_000 + "END",), None)
    )
    line = written.getvalue()
    assert len(line) < LINE_CHARS + 100
    assert line.startswith("WARNING aaa")
    assert line.endswith("aEND\n")
    assert "characters left out" in line


def test_usual_lines_are_whole() -> None:
    assert bounded("a" * LINE_CHARS) == "a" * LINE_CHARS
