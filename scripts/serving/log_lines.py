"""Lines of a log have a bound: an error may quote a whole request, and a request may be megabytes."""

from __future__ import annotations

import logging

LINE_CHARS = 8192
_END_CHARS = 1024


def bounded(text: str) -> str:
    """`text`, without its middle where it is longer than LINE_CHARS. The end has a traceback's error."""
    left_out = len(text) - LINE_CHARS
    if left_out <= 0:
        return text
    middle = f" ... ({left_out} characters left out) ... "
    return text[: LINE_CHARS - _END_CHARS] + middle + text[-_END_CHARS:]


class BoundedFormatter(logging.Formatter):
    """Formats as its base class does, up to LINE_CHARS."""

    def format(self, record: logging.LogRecord) -> str:
        return bounded(super().format(record))
