"""Environments of their own for clients: virtual environments from PyPI, a folder from npm.

They are kept in `results/clients/` of this checkout, under the digest of what they were made from,
so that a machine installs each set of versions once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from integration.deployment import REPO

CACHE = REPO / "results" / "clients"
INSTALL_S = 400
UV = "uv==0.13.9"
"""Installs the Python clients: in a fifth of pip's time, and CI counts its minutes."""
UNREACHABLE = re.compile(
    r"error sending request|from versions: none|E(NOTFOUND|AI_AGAIN|CONNREFUSED)"
)
"""What uv, pip and npm say where there is no network."""


class Install:
    """An environment that is complete, or being made meanwhile."""

    def __init__(self, name: str, sources: Sequence[Path], script: str) -> None:
        """`script` makes the folder `$FOLDER` out of `sources`, which are `$1`, `$2`..."""
        content = b"".join(each.read_bytes() for each in sources)
        digest = hashlib.sha256(content + sys.version.encode()).hexdigest()[:12]
        self.folder = CACHE / f"{name}-{digest}"
        self._process: subprocess.Popen[str] | None = None
        if (self.folder / "complete").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            ["bash", "-euc", f"{script}\ntouch $FOLDER/complete", name, *map(str, sources)],
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                "PYTHON": sys.executable,
                "FOLDER": str(self.folder),
            },
        )

    def wait(self) -> Path:
        """The complete folder. Skips the test where the registry cannot be reached."""
        if self._process is None:
            return self.folder
        output, _ = self._process.communicate(timeout=INSTALL_S)
        if self._process.returncode != 0:
            assert UNREACHABLE.search(output), output
            pytest.skip(f"the package registry cannot be reached: {output.strip()[-200:]}")
        self._process = None
        return self.folder

    def cancel(self) -> None:
        """End an installation that nobody waited for."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def from_pypi(requirements: Path) -> Install:
    """A virtual environment with what `requirements` pins."""
    return Install(
        requirements.stem,
        [requirements],
        "$PYTHON -m venv $FOLDER/uv\n"
        f"$FOLDER/uv/bin/python -m pip install -q --disable-pip-version-check --retries 1 {UV}\n"
        "$PYTHON -m venv --without-pip $FOLDER\n"
        "$FOLDER/uv/bin/uv pip install -q --no-cache --no-deps --python $FOLDER/bin/python -r $1",
    )


def from_npm(package: Path) -> Install:
    """`node_modules` with what `package` (`package.json`) names. Runs no scripts of packages.

    There is no lock file: npm finds its own incomplete where a package has programs for platforms
    that the registry lacks.
    """
    return Install(
        package.parent.name,
        [package],
        "mkdir -p $FOLDER\ncp $1 $FOLDER\ncd $FOLDER\n"
        "npm install --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error "
        "--fetch-retries=1 --fetch-retry-mintimeout=1000 --fetch-retry-maxtimeout=2000",
    )
