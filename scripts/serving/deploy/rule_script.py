"""What every rule script begins with: its configuration, and a way to speak to the person.

Snakemake prints a traceback for any exception that leaves a script. A person who can fix the cause
deserves better, so an OperatorError ends the script with its own words and exit status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.config import ResolvedConfig, as_plain
from serving.config.resolve import read_resolved
from serving.console import without_colours
from serving.errors import OperatorError
from serving.progress import Report


def script_config(config: ResolvedConfig, failures_file: Path) -> dict[str, Any]:
    """What the Snakefile gives the scripts as `snakemake.config`."""
    return {"resolved": as_plain(config), "failures_file": str(failures_file)}


@contextmanager
def rule_script(snakemake: Any) -> Iterator[tuple[ResolvedConfig, Report]]:
    """Gives the configuration of the run, and `report(line)`, which prints and logs.

    An OperatorError inside is printed and logged too, is repeated when the run ends, and becomes
    SystemExit(1).
    """
    config = read_resolved(snakemake.config["resolved"])
    log = Path(snakemake.log[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as lines:

        def report(line: str) -> None:
            print(line, flush=True)
            print(without_colours(line), file=lines, flush=True)

        try:
            yield config, report
        except OperatorError as exc:
            print(f"\n{exc}\n", file=sys.stderr, flush=True)
            print(exc, file=lines, flush=True)
            with open(snakemake.config["failures_file"], "a", encoding="utf-8") as failures:
                failures.write(f"{exc}\0")  # a paragraph may hold empty lines, so a NUL ends it
            sys.exit(1)
