"""How a rule's script speaks to the person at the terminal: lines now, and one paragraph at the end.

Snakemake prints a traceback for any exception that leaves a script. What an operator can fix
deserves better, so it ends the process with its own words and exit status 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import OperatorError
from serving.progress import Report

FAILURES = "SERVING_FAILURES"
"""Names the file where paragraphs are gathered, each ended by a NUL, to be said again at the end."""


@contextmanager
def reporting(log: str | Path) -> Iterator[Report]:
    """Yields `report(line)`, which writes to the terminal and to `log`.

    An OperatorError inside goes to standard error and to `log`, and becomes SystemExit(1).
    """
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:

        def report(line: str) -> None:
            print(line, flush=True)
            print(line, file=lines, flush=True)

        try:
            yield report
        except OperatorError as exc:
            print(f"\n{exc}\n", file=sys.stderr, flush=True)
            print(exc, file=lines, flush=True)
            if gathered := os.environ.get(FAILURES):
                with open(gathered, "a", encoding="utf-8") as failures:
                    failures.write(f"{exc}\0")
            sys.exit(1)
