"""The frontend's log. One line for each request must cost neither a write nor a time of day.

Warnings are written at once. Other lines wait for up to LATER_S and are written together, so a
process that is killed loses its last lines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

from serving.log_lines import BoundedFormatter

LATER_S = 0.05


class LaterHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to `stream`, by default stderr."""

    def __init__(self, stream: object = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # As in all handlers: a line that cannot be formatted stops nobody.
            self.handleError(record)
            return
        if record.levelno >= logging.WARNING:
            self.flush()
        elif len(self._lines) == 1:
            try:
                asyncio.get_running_loop().call_later(LATER_S, self.flush)
            except RuntimeError:  # There is no event loop, or not in this thread.
                self.flush()

    def flush(self) -> None:
        """Write the waiting lines; also called when the process exits."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


class LineFormatter(BoundedFormatter):
    """Formats the time of day as the default does, but only once a second."""

    _second, _formatted = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._formatted = time.strftime(self.default_time_format, time.localtime(second))
        return f"{self._formatted},{int(record.msecs):03d}"


def set_up(name: str) -> None:
    """Log in the name of this process, from LOG_LEVEL up."""
    handler = LaterHandler()
    handler.setFormatter(LineFormatter(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"), handlers=[handler])
    # The format has none of these, so no line needs to look them up.
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    logging._srcfile = None  # The library's documentation says to do it so.
