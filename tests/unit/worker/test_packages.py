"""A worker imports what its image installs, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[3] / "scripts"


def test_worker_starts_without_the_packages_of_the_torch_engine() -> None:
    """Images for TensorRT-LLM get `WORKER_PACKAGES` only."""
    program = """
import sys

from serving.deploy.containers.image_recipes import TORCH_PACKAGES

for package in TORCH_PACKAGES:
    sys.modules.pop(package.replace("ucxx-cu13", "ucxx"), None)
    sys.modules[package.replace("ucxx-cu13", "ucxx")] = None
for module in [name for name in sys.modules if name.startswith("serving")]:
    del sys.modules[module]
import serving.worker.__main__
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
