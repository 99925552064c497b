"""The log of a program since it was started: its newest line, and its last words when it ended."""

from __future__ import annotations

import re
from pathlib import Path

from serving.errors import OperatorError

LAST_LINES = 15
TAIL_BYTES = 256 * 1024
LINE_CHARS = 400
"""Of a line that is quoted. Libraries log whole requests in one."""
_LINE_HEAD = re.compile(r"^\S+ \S+ \S+ (?:INFO|WARNING|ERROR|CRITICAL|DEBUG) \S+: ")
_CRITICAL_HEAD = re.compile(r"^\S+ \S+ \S+ CRITICAL \S+: ")
"""Our programs log only one thing at this level: the OperatorError that ends them."""
_REMEDY = "  -> "


class ProgramLog:
    """Everything that is appended to `path` from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0

    def newest_line(self) -> str:
        """Without the time and level in front of it; empty when nothing was logged."""
        lines = self._lines()
        return _LINE_HEAD.sub("", lines[-1]) if lines else ""

    def startup_failure(self, program: str, how: str) -> OperatorError:
        """The error for a program that ended while starting; `how` is how it ended.

        A program that explained its end is quoted with its own remedy, others with their last lines.
        """
        lines = self._lines() or ["(nothing)"]
        if explanation := _explanation(lines):
            what, _, remedy = explanation.partition(f"\n{_REMEDY}")
            return OperatorError(f"{program} could not start: {what}", remedy=remedy)
        quoted = "\n".join(f"  | {_shortened(line)}" for line in lines[-LAST_LINES:])
        return OperatorError(
            f"{program} ended while it was starting ({how}). The end of its log:\n{quoted}",
            remedy=f"fix the problem that its log names; the whole log is {self.path}",
        )

    def _lines(self) -> list[str]:
        """The end of what was appended; of the whole file when it was rotated in between."""
        try:
            with self.path.open("rb") as file:
                size = self.path.stat().st_size
                start = self._start if size >= self._start else 0
                file.seek(max(start, size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()]


def _shortened(line: str) -> str:
    left_out = len(line) - LINE_CHARS
    return line if left_out <= 0 else f"{line[:LINE_CHARS]} ... ({left_out} more characters)"


def _explanation(lines: list[str]) -> str:
    """The OperatorError that a program of ours logged last; empty when there is none."""
    starts = [index for index, line in enumerate(lines) if _CRITICAL_HEAD.match(line)]
    if not starts:
        return ""
    rest = lines[starts[-1] :]
    end = next((index for index, line in enumerate(rest) if line.startswith(_REMEDY)), 0)
    return _CRITICAL_HEAD.sub("", "\n".join(rest[: end + 1]))
