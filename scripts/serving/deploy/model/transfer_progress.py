"""How far a long download is: a bar where a person watches, and now and then a line elsewhere."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from serving.engine.files import human
from serving.progress import Report

LINE_EVERY_S = 3.0


class TransferProgress:
    """Progress of one transfer of `total_bytes`, of which `done_bytes` are here from before.

    On a terminal it draws a bar that vanishes at the end. In a pipe, a file or a dumb terminal it
    reports a line every few seconds. Both report one line when everything has arrived.
    """

    def __init__(
        self,
        name: str,
        total_bytes: int,
        report: Report,
        *,
        done_bytes: int = 0,
        console: Console | None = None,
    ) -> None:
        self._name, self._total_bytes, self._report = name, total_bytes, report
        self._first = self._done = done_bytes
        self._started = self._reported = time.monotonic()
        self._console = console or Console()
        self._bar: Progress | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar = self._exit.enter_context(bar)
            bar.add_task(self._name, total=self._total_bytes, completed=self._done)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._exit.close()
        self._bar = None

    def advance_to(self, done_bytes: int) -> None:
        """Everything up to `done_bytes` has arrived."""
        self._done = done_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes)
        if self._done == self._total_bytes or (
            self._bar is None and now - self._reported > LINE_EVERY_S
        ):
            self._reported = now
            rate = (self._done - self._first) / max(now - self._started, 1e-3)
            percent = 100 * self._done // max(1, self._total_bytes)
            self._report(
                f"{self._name}: {percent}% of {human(self._total_bytes)} ({human(rate)}/s)"
            )
