"""The CI script hides what a machine happens to have."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """The folder of allowed tools, on a machine where etcd and nats-server are installed too."""
    machine, folder = tmp_path / "machine", tmp_path / "tools"
    machine.mkdir()
    folder.mkdir()
    for name in ("etcd", "nats-server", "a-tool-of-this-machine"):
        (machine / name).write_text("#!/bin/sh\n")
        (machine / name).chmod(0o755)
    subprocess.run(
        [ROOT / ".ci" / "link_tools", folder],
        env={**os.environ, "PATH": f"{machine}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        timeout=60,
    )
    return folder


@pytest.mark.parametrize("name", ["etcd", "nats-server", "a-tool-of-this-machine", "pytest"])
def test_installed_tool_that_the_readme_does_not_ask_for_is_hidden(
    allowed: Path, name: str
) -> None:
    assert shutil.which(name, path=str(allowed)) is None


@pytest.mark.parametrize("name", ["bash", "env", "cat", "awk", "git", "python3"])
def test_tool_that_every_machine_has_is_found(allowed: Path, name: str) -> None:
    assert shutil.which(name, path=str(allowed))


def test_environment_made_with_the_allowed_python_outlives_the_folder_of_tools(
    allowed: Path, tmp_path: Path
) -> None:
    command = ["python3", "-m", "venv", "--without-pip", tmp_path / "venv"]
    subprocess.run(command, env={"PATH": str(allowed)}, check=True, timeout=60)
    shutil.rmtree(allowed)
    program = "import ssl, sys; assert sys.prefix != sys.base_prefix"
    subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", program], check=True, timeout=60)
