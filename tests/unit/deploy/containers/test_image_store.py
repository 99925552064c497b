"""Finding, naming and fetching images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving.config import ContainerConfig, parse
from serving.deploy.containers import image_store
from serving.deploy.containers.image_store import find_image, local_name, pull_commands, pull_image
from unit.deploy.fake_programs import Script

DIGEST = "sha256:" + "cd" * 32


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def container(runtime: str, image: str) -> ContainerConfig:
    return parse({"container": {"runtime": runtime, "image": image}}).container


@pytest.mark.parametrize(
    ("runtime", "image", "name"),
    [
        ("docker", "nvcr.io/nvidia/x:1", "nvcr.io/nvidia/x:1"),
        ("apptainer", "docker://nvcr.io/nvidia/x:1", "results/images/nvcr.io-nvidia-x-1.sif"),
        ("enroot", "docker://nvcr.io/nvidia/x:1", "results/images/nvcr.io-nvidia-x-1.sqsh"),
        ("apptainer", "/images/x.sif", "/images/x.sif"),
    ],
)
def test_reference_becomes_a_file_where_the_runtime_runs_files(
    runtime: str, image: str, name: str
) -> None:
    assert local_name(container(runtime, image)) == name


@pytest.mark.parametrize(
    ("runtime", "image", "digest", "commands"),
    [
        ("docker", "nvcr.io/n/x:1", None, [["docker", "pull", "nvcr.io/n/x:1"]]),
        (
            "podman",
            "host:5000/n/x:1",
            DIGEST,
            [
                ["podman", "pull", f"host:5000/n/x@{DIGEST}"],
                ["podman", "tag", f"host:5000/n/x@{DIGEST}", "host:5000/n/x:1"],
            ],
        ),
        (
            "apptainer",
            "docker://debian:12",
            None,
            [["apptainer", "pull", "results/images/debian-12.sif", "docker://debian:12"]],
        ),
        (
            "enroot",
            "docker://nvcr.io/nvidia/x:1",
            None,
            [
                [
                    *("enroot", "import", "--output", "results/images/nvcr.io-nvidia-x-1.sqsh"),
                    "docker://nvcr.io#nvidia/x:1",
                ]
            ],
        ),
    ],
)
def test_how_an_image_is_fetched(
    runtime: str, image: str, digest: str | None, commands: list[list[str]]
) -> None:
    assert pull_commands(container(runtime, image), digest) == commands


def test_second_pull_fetches_what_the_first_one_did(script: Script) -> None:
    calls = script(
        "docker",
        f"case $1 in image) echo sha256:{'ab' * 32} '[h.example/x@{DIGEST}]' ;; esac",
    )
    wanted = container("docker", "h.example/x:1")
    assert pull_image(wanted, print).ok
    assert json.loads((image_store.IMAGES / "pinned.json").read_text()) == {"h.example/x:1": DIGEST}
    assert pull_image(wanted, print).ok
    pulls = [line for line in calls.read_text().splitlines() if " pull " in line]
    assert pulls == ["docker pull h.example/x:1", f"docker pull h.example/x@{DIGEST}"]


def test_failed_pull_pins_nothing(script: Script) -> None:
    script("docker", "echo 'manifest unknown' >&2; exit 1")
    finding = pull_image(container("docker", "h.example/x:1"), print)
    assert finding.blocks
    assert not (image_store.IMAGES / "pinned.json").exists()


def test_file_or_named_container_is_found(script: Script, tmp_path: Path) -> None:
    script("enroot", "echo one; echo two")
    assert find_image(container("enroot", "two")).ok
    assert not find_image(container("enroot", "three")).ok
    absent = find_image(container("apptainer", "./x.sif"))
    assert "apptainer pull image.sif" in absent.remedy
    (tmp_path / "x.sif").touch()
    assert find_image(container("apptainer", "./x.sif")).ok
    assert "container.pull" in find_image(container("apptainer", "docker://debian:12")).remedy
