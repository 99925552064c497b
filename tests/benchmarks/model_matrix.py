"""Which models the torch engine serves exactly: tiny random ones of many families and forms.

    python tests/benchmarks/model_matrix.py [--only WORD] [--device cpu] [--write] [--new]

Each row goes the whole way: a checkpoint on disk, `fetch_model`, `build_engine`, and the engine over
the result in every mode (alone, four together, in chunks, with a prefix hit, with KV from another
engine), against `generate` on the checkpoint. A row is `exact` or `refused` with a reason and a
remedy; `WRONG` and `CRASH` end the script with status 1. The table is Markdown.
Rows are in `models/rows/`, one module for each kind. `--write` puts the lines of the rows that ran
into docs/supported-models.md. `--new` runs the rows that have no line there yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.models.all_rows import ROWS
from benchmarks.models.run_row import run
from benchmarks.models.support_table import (
    PAGE,
    is_current,
    table,
    update,
    written,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="rows whose name or form contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="update docs/supported-models.md")
    parser.add_argument("--new", action="store_true", help="rows without a line on that page")
    options = parser.parse_args()
    known = written(PAGE.read_text("utf-8")) if options.new else {}
    results = []
    for row in ROWS:
        if options.only.lower() not in f"{row.name} {row.form}".lower():
            continue
        if is_current(row, known):
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = run(row, Path(folder), options.device)
        print(
            f"{result.verdict:8} {result.seconds:5.1f} s  {row.name}, {row.form}", file=sys.stderr
        )
        results.append((row, result))
    if options.write:
        PAGE.write_text(update(PAGE.read_text("utf-8"), results), "utf-8")
    else:
        print(table(results))
    unexpected = [(row, result) for row, result in results if result.verdict != row.expected]
    for row, result in unexpected:
        print(
            f"{row.name}, {row.form}: {result.verdict} instead of {row.expected}", file=sys.stderr
        )
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
