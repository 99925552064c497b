"""Snakemake's sub-processes parse the Snakefile again, and must see the same deployment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROBE = """

rule probe:
    output:
        "probe.txt",
    run:
        Path(output[0]).write_text(f"{PLAN.topology} {CONFIG.frontend.port}")
"""


def test_subprocess_sees_the_deployment_of_the_main_process(tmp_path: Path) -> None:
    workflow, folder = tmp_path / "workflow", tmp_path / "deployment"
    workflow.mkdir()
    for name in ("rules", "scripts", "envs", "profiles"):
        (workflow / name).symlink_to(ROOT / name)
    # Only a rule with `run:` runs in a sub-process; the workflow itself has none.
    (workflow / "Snakefile").write_text((ROOT / "Snakefile").read_text() + PROBE)
    # A target that serves nothing is about the topology deployed here. A sub-process, whose own
    # command line names no target, would take the one in the config.
    (folder / "run").mkdir(parents=True)
    record = {"topology": "agg_router", "programs": [], "engine_fingerprint": ""}
    (folder / "run" / "topology.json").write_text(json.dumps(record))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--snakefile", str(workflow / "Snakefile")),
            *("--directory", str(folder), "--cores", "1", "probe.txt"),
            *("--config", "frontend-port=8123"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout
    assert (folder / "probe.txt").read_text() == "agg_router 8123"
    assert not list((folder / ".snakemake").glob("resolved-*"))
