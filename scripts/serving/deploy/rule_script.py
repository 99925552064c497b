"""What every rule script begins with: its configuration, and a way to speak to the person.

Snakemake prints a traceback for any exception that leaves a script. A person who can fix the cause
deserves better, so an OperatorError ends the script with its own words and exit status 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from serving.config import ResolvedConfig, as_plain
from serving.config.resolve import read_resolved
from serving.console import without_colours
from serving.errors import OperatorError, disk_error
from serving.progress import Report

INTERRUPTED = 130


def script_config(config: ResolvedConfig, failures_file: Path) -> dict[str, Any]:
    """What the Snakefile gives the scripts as `snakemake.config`."""
    return {"resolved": as_plain(config), "failures_file": str(failures_file)}


@contextmanager
def rule_script(snakemake: Any) -> Iterator[tuple[ResolvedConfig, Report]]:
    """Gives the configuration of the run, and `report(line)`, which prints and logs.

    An OperatorError inside is printed and logged too, is repeated when the run ends, and becomes
    SystemExit(1). So does an OSError of a full disk. Ctrl-C ends without a traceback.
    """
    config = read_resolved(snakemake.config["resolved"])
    log = Path(snakemake.log[0])
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        lines = log.open("w", encoding="utf-8")
    except OSError:
        lines = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed below)

    def write(line: object) -> None:
        """A log that cannot be written stops nothing: what it says is printed, too."""
        with suppress(OSError):
            print(line, file=lines, flush=True)

    def report(line: str) -> None:
        print(line, flush=True)
        write(without_colours(line))

    def fail(exc: OperatorError) -> NoReturn:
        print(f"\n{exc}\n", file=sys.stderr, flush=True)
        write(exc)
        with (
            suppress(OSError),
            open(snakemake.config["failures_file"], "a", encoding="utf-8") as failures,
        ):
            failures.write(f"{exc}\0")  # a paragraph may hold empty lines, so a NUL ends it
        sys.exit(1)

    try:
        yield config, report
    except OperatorError as exc:
        fail(exc)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same target again to go on", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except OSError as exc:
        if (error := disk_error(exc)) is None:
            raise
        fail(error)
    finally:
        with suppress(OSError):
            lines.close()
