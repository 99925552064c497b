"""Lines of the log are written whole and in order, and warnings at once."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Iterator

import pytest
from serving.frontend.log import LaterHandler, LineFormatter
from waiting import until


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(written: io.StringIO) -> Iterator[logging.Logger]:
    logger = logging.Logger("test", logging.INFO)
    handler = LaterHandler(written)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    yield logger
    handler.close()


async def test_lines_of_the_event_loop_are_written_together_soon(
    logger: logging.Logger, written: io.StringIO
) -> None:
    for number in range(3):
        logger.info("line %d", number)
    assert written.getvalue() == ""
    await until(lambda: written.getvalue() != "")
    lines = written.getvalue().splitlines()
    assert [line[-6:] for line in lines] == ["line 0", "line 1", "line 2"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO ", line) for line in lines)
    logger.info("again")  # a new timer for it
    await until(lambda: written.getvalue().endswith("again\n"))


async def test_warning_is_written_at_once_with_the_lines_before_it(
    logger: logging.Logger, written: io.StringIO
) -> None:
    logger.info("before")
    logger.warning("now")
    assert re.findall(r"before\n.*now\n", written.getvalue())


def test_lines_are_written_at_once_without_an_event_loop(
    logger: logging.Logger, written: io.StringIO
) -> None:
    logger.info("starting")
    assert written.getvalue().endswith("starting\n")


async def test_line_of_another_thread_is_written_at_once(
    logger: logging.Logger, written: io.StringIO
) -> None:
    await asyncio.to_thread(logger.info, "from a thread")
    assert written.getvalue().endswith("from a thread\n")


async def test_waiting_lines_are_written_when_the_process_exits(
    logger: logging.Logger, written: io.StringIO
) -> None:
    logger.info("last words")
    logger.handlers[0].flush()  # as `logging.shutdown` does
    assert written.getvalue().endswith("last words\n")


async def test_line_that_cannot_be_formatted_raises_nothing(
    logger: logging.Logger, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger.info("%d", "no number")
    logger.warning("fine")
    assert written.getvalue().endswith("fine\n")


def test_time_of_day_equals_that_of_the_default_formatter(logger: logging.Logger) -> None:
    ours, theirs = LineFormatter("%(asctime)s"), logging.Formatter("%(asctime)s")
    for created in (0.0, 1.5, 1.999, 1_700_000_000.0625, 3.25):
        record = logging.makeLogRecord({"created": created, "msecs": created % 1 * 1000})
        assert ours.format(record) == theirs.format(record)
