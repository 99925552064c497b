"""Which engine the benchmarks measure: the newest that was built here, or else the default one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def find_engine(chosen: Path | None) -> Path:
    """`chosen`, or the newest of `results/engines`; when there is none, build the default there."""
    if chosen is not None:
        return chosen
    if not _built():
        print("no engine in results/engines: building the default one", file=sys.stderr)
        command = [sys.executable, "-m", "snakemake", "build_engine", "--cores", "all"]
        subprocess.run(
            [*command, "--directory", str(ROOT)], cwd=ROOT, stdout=sys.stderr, check=True
        )
    return _built()[-1]


def _built() -> list[Path]:
    manifests = (ROOT / "results" / "engines").glob("*/engine.json")
    return [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime)]
