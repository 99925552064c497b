"""The cost of the workflow itself: a run with nothing to do, and a warm start by phase.

    python tests/benchmarks/deploy.py [--rounds N] [--results DIR] [--target TARGET]

In a deployment of its own, with free ports and a temporary folder, and with the artefacts of
`--results` (default: those of this checkout) if there are any; else they are made first. Rows, one
JSON object a line:

- `warm start: PHASE`: seconds of each phase, from the command to the first answer, as a share of
  `warm start total`. Artefacts are there, no program runs.
- `no-op serve vs empty snakemake`: wall seconds of the same command when everything runs, over
  those of an empty workflow (one rule, one input, nothing to do), in turns; medians. Goal: 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from integration.deployment import Deployment, share_results  # noqa: E402

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "all"]
EMPTY = 'rule all:\n    input:\n        "there",\n'
FINISHED = re.compile(r"Finished jobid: \d+ \(Rule: (\w+)\)")
PHASES = {
    "checks, etcd and NATS": {
        *("check_host", "check_gpu", "check_ucx", "fetch_binaries", "start_etcd", "start_nats"),
        *("download_model", "build_engine", "stop_obsolete"),
    },
    "workers": {"start_worker"},
    "frontend and first answer": {"start_frontend"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--target", default="serve_disagg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-deploy-") as folder:
        directory = Path(folder, "deployment")
        deployment = Deployment(directory)
        deployment.config["engine"] = {}  # the default, as a newcomer has it
        if options.results.is_dir():
            share_results(options.results, directory / "results")
        try:
            note("preparing the artefacts")
            deployment.snakemake(options.target, timeout_s=1800)
            deployment.snakemake("stop")
            warm_start(deployment, options.target)
            no_op(deployment, options.target, Path(folder, "empty"), options.rounds)
        finally:
            deployment.stop()


def warm_start(deployment: Deployment, target: str) -> None:
    """Phases end when the last rule in them has finished."""
    note("warm start")
    begun = time.monotonic()
    ends = dict.fromkeys(PHASES, 0.0)
    first_job = 0.0
    with subprocess.Popen(
        command(deployment, target),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            now = time.monotonic() - begun
            if line.startswith("Execute ") and not first_job:
                first_job = now
            if match := FINISHED.match(line):
                for phase, rules in PHASES.items():
                    if match.group(1) in rules:
                        ends[phase] = now
    total = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{target} failed:\n{deployment.logs()}")
    before = 0.0
    marks = {"Snakemake up to the first job": first_job, **ends, "Snakemake's end": total}
    for phase, end in marks.items():
        if end:
            row(f"warm start: {phase}", end - before, limit=total, limit_name="warm start total")
            before = end
    row("warm start total", total, limit=total, limit_name="warm start total")


def no_op(deployment: Deployment, target: str, empty: Path, rounds: int) -> None:
    """Alternating, so that both see the same load. The first round does not count."""
    note("nothing to do")
    empty.mkdir()
    (empty / "Snakefile").write_text(EMPTY)
    (empty / "there").touch()
    ours, peer = [], []
    for _ in range(rounds + 1):
        ours.append(timed(command(deployment, target), ROOT))
        peer.append(timed(SNAKEMAKE, empty))
    ours_s, peer_s = (statistics.median(times[1:]) for times in (ours, peer))
    row(f"no-op {target} vs empty snakemake", ours_s, peer=peer_s, peer_name="empty snakemake")


def command(deployment: Deployment, target: str) -> list[str]:
    """As `Deployment.snakemake` runs it; the config file is there since the first run."""
    directory = deployment.directory
    where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(directory)]
    return [*SNAKEMAKE, target, *where, "--configfile", str(directory / "config.yaml")]


def timed(arguments: list[str], directory: Path) -> float:
    """Wall seconds. Anything but "nothing to do" would be another measurement."""
    begun = time.monotonic()
    done = subprocess.run(
        arguments,
        cwd=directory,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    taken = time.monotonic() - begun
    if "Nothing to be done" not in done.stderr:
        raise SystemExit(f"there was something to do:\n{done.stderr}")
    return taken


def row(name: str, ours_s: float, **other: float | str) -> None:
    """`other` has `peer` or `limit` in seconds, and its name."""
    against = other["peer"] if "peer" in other else other["limit"]
    assert isinstance(against, float)
    fields = {k: round(v, 3) if isinstance(v, float) else v for k, v in other.items()}
    ratio = round(ours_s / against, 3)
    content = {"name": name, "ours": round(ours_s, 3), **fields, "unit": "s", "ratio": ratio}
    print(json.dumps(content), flush=True)


def note(what: str) -> None:
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
