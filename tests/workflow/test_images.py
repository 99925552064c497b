"""`build_image` in the DAG: asked for by name, in two steps, and by nothing that serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from serving.deploy.containers.image_recipes import SERVING_RECORD, ServingImage

ROOT = Path(__file__).parents[2]
PODMAN = "container={runtime: podman}"


def snakemake(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    return subprocess.run(
        [*command, "--directory", str(directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test writes what `podman` is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    path = folder / "podman"
    path.touch(mode=0o755)
    return path


def test_image_is_built_in_two_steps(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "-n", "build_image", "--config", PODMAN)
    assert done.returncode == 0, done.stdout
    assert {"build_base_image", "build_image"} <= set(done.stdout.split())
    assert "start_worker" not in done.stdout


def test_serving_builds_no_image(tmp_path: Path) -> None:
    done = snakemake(tmp_path, "-n", "serve_disagg", "--config", PODMAN)
    assert done.returncode == 0, done.stdout
    assert "check_container" in done.stdout
    assert "build_image" not in done.stdout


def test_start_without_an_image_names_both_remedies(tmp_path: Path, podman: Path) -> None:
    podman.write_text("#!/bin/sh\necho 4.3.1\n")
    done = snakemake(tmp_path, "results/checks/container.json", "--config", PODMAN)
    assert done.returncode == 1
    [*_, last] = done.stdout.split("Exiting because a job execution failed")
    assert "container.image is not set" in last
    assert "snakemake build_image" in last


def test_machine_that_cannot_build_images_gets_an_error_with_the_remedy(
    tmp_path: Path, podman: Path
) -> None:
    settings = "container={runtime: podman, base_image: localhost/none-such}"
    podman.write_text("#!/bin/sh\n[ $1 = info ] && exit 0\necho 'no such host' >&2\nexit 125\n")
    done = snakemake(tmp_path, "build_image", "--config", settings)
    assert done.returncode == 1
    [*_, last] = done.stdout.split("Exiting because a job execution failed")
    assert "the base image localhost/none-such:1.2.0 is not available" in last
    assert "cannot reach localhost" in last
    assert "Traceback" not in done.stdout


def test_check_looks_at_the_built_image(tmp_path: Path, podman: Path) -> None:
    folder = tmp_path / "results" / "images"
    folder.mkdir(parents=True)
    record = ServingImage(image="localhost/serving:abc", detail="", base="", builder="podman")
    (folder / SERVING_RECORD).write_bytes(msgspec.json.encode(record))
    podman.write_text("#!/bin/sh\n[ $1 = info ] && echo 4.3.1 && exit 0\necho gone >&2; exit 125\n")
    done = snakemake(tmp_path, "results/checks/container.json", "--config", PODMAN)
    assert "podman pull localhost/serving:abc" in done.stdout
