"""A virtual environment for aiperf and matplotlib, from pinned packages."""

import subprocess
import sys
from pathlib import Path

from serving.deploy.rule_script import rule_script
from serving.errors import OperatorError

with rule_script(snakemake) as (_, report):
    folder = Path(snakemake.output[0]).parent
    pins = snakemake.input[0]
    report(f"installing {pins} into {folder} (about 1.2 GB; once)")
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--progress-bar",
            "off",
            "-r",
            pins,
        ],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
            raise OperatorError(
                f"aiperf cannot be installed:\n{output}",
                remedy="let this machine reach a Python package index, or set `bench.python` to a "
                "Python that has aiperf and matplotlib",
            )
    Path(snakemake.output[0]).touch()
