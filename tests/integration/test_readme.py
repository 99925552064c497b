"""The README's commands, run as they are written, by a newcomer who has just cloned."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from integration.deployment import REPO, share_results
from integration.readme import block

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

DEFAULT_PORTS = {"frontend": 8000, "etcd": 2379, "etcd peer": 2380, "nats": 4222}


def test_run_and_test_commands_share_their_installation() -> None:
    run, test = block("run").strip(), block("test").strip()
    assert run.endswith(" -e . && snakemake serve_disagg --cores all")
    assert test == run.replace(
        " -e . && snakemake serve_disagg --cores all", " -e '.[test]' && pytest"
    )


def test_quick_start_serves_answers_checks_and_stops(tmp_path: Path, default_results: Path) -> None:
    """Everything after `pip install`, in a copy of the checkout, with the default ports."""
    for what, port in DEFAULT_PORTS.items():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} ({what}) is in use here")
    checkout = tmp_path / "checkout"
    files = ["Snakefile", "pyproject.toml", "rules", "scripts", "config", "envs", "profiles"]
    for name in files:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy2
        checkout.mkdir(exist_ok=True)
        copy(REPO / name, checkout / name)
    share_results(default_results, checkout / "results")
    serve = block("run").strip().rpartition("&& ")[2]
    script = f"set -e\n{serve}\n{block('use')}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=checkout,
            env={**os.environ, "PATH": path},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=500,
        )
    finally:
        subprocess.run(
            [sys.executable, "-m", "snakemake", "stop"],
            cwd=checkout,
            capture_output=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stdout
    assert "smoke test passed" in done.stdout
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"id":"chatcmpl-')]
    [answer] = [json.JSONDecoder().raw_decode(line)[0] for line in answers]
    assert answer["choices"][0]["message"]["content"]
    assert "nothing is left" in done.stdout
