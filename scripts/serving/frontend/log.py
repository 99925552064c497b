"""The frontend's log: a line for each request must not cost a write, nor its time of day.

Warnings are written at once, other lines of the event loop's thread with those that follow within
LATER_S: a process that is killed loses the last of those.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

LATER_S = 0.05


class LaterHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, or what else it is given."""

    def __init__(self, stream: object = None) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # as all handlers do: a line that cannot be told stops nobody
            self.handleError(record)
            return
        if record.levelno >= logging.WARNING:
            self.flush()
        elif len(self._lines) == 1:
            try:
                asyncio.get_running_loop().call_later(LATER_S, self.flush)
            except RuntimeError:  # nothing runs yet, or on this thread
                self.flush()

    def flush(self) -> None:
        """Write what has come together; also called when the process exits."""
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


class LineFormatter(logging.Formatter):
    """The default's time of day, made once a second."""

    _second, _told = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._second = second
            self._told = time.strftime(self.default_time_format, time.localtime(second))
        return f"{self._told},{int(record.msecs):03d}"


def set_up(name: str) -> None:
    """Log as the process of that name, from LOG_LEVEL on."""
    handler = LaterHandler()
    handler.setFormatter(LineFormatter(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"), handlers=[handler])
    # Not in the format, so not looked up for every line either.
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    logging._srcfile = None  # the way to do that, by the library's documentation
