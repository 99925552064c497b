"""Building images with a builder that is a shell script; what is refused, and why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from serving.config import Config, parse
from serving.deploy.containers import image_recipes
from serving.deploy.containers.image_build import (
    build_base,
    build_serving,
    choose_builder,
    read_base,
    source_commands,
)
from serving.errors import OperatorError
from unit.deploy.fake_programs import Script

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Usage = namedtuple("Usage", "total used free")
# Knows the images that were pulled, tagged or built with it.
BUILDER = f"""
known="$CALLS.images"; touch "$known"
case $1 in
image) for last; do :; done; grep -qx "$last" "$known" && echo sha256:{"ab" * 32} '[]' ;;
pull) echo "Copying blob"; echo "$2" >>"$known" ;;
build) for each; do case $each in --tag=*) echo "${{each#--tag=}}" >>"$known" ;; esac; done ;;
esac
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results" / "images"


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))


def config(**raw: Any) -> Config:
    return parse({"container": {"runtime": "podman", **raw}, "engine": {"backend": "torch"}})


def test_release_image_is_fetched_once_with_progress(script: Script, folder: Path) -> None:
    calls, said = script("podman", BUILDER), list[str]()
    base = build_base(config(), folder, said.append)
    assert base.reference == "nvcr.io/nvidia/tensorrt-llm/release:1.2.0"
    assert "Copying blob" in said
    assert read_base(folder / image_recipes.BASE_RECORD) == base
    build_base(config(), folder, said.append)
    pulls = [line for line in calls.read_text().splitlines() if line.startswith("podman pull")]
    assert pulls == ["podman pull nvcr.io/nvidia/tensorrt-llm/release:1.2.0"]


def test_base_that_cannot_be_fetched_says_why_and_what_to_do(script: Script, folder: Path) -> None:
    failing = "case $1 in image) exit 1 ;; pull) echo 401 unauthorized >&2; exit 1 ;; esac"
    script("podman", failing)
    with pytest.raises(OperatorError, match="401 unauthorized") as caught:
        build_base(config(), folder, print)
    assert "podman login nvcr.io" in caught.value.remedy
    assert not (folder / image_recipes.BASE_RECORD).exists()


def test_serving_image_is_built_on_the_base_from_its_own_context(
    script: Script, folder: Path
) -> None:
    calls = script("podman", BUILDER)
    settings = config(base_image="local/base", base_tag="7")
    Path("calls.images").write_text("local/base:7\n")
    base = build_base(settings, folder, print)
    serving = build_serving(settings, base, folder, print)
    assert "podman pull" not in calls.read_text()
    [built] = [line for line in calls.read_text().splitlines() if line.startswith("podman build")]
    assert f"--tag={serving.image}" in built
    assert built.endswith(str(folder / "context"))
    assert (folder / "serving.Dockerfile").read_text().splitlines()[1] == "FROM local/base:7"
    assert (folder / "context" / "scripts" / "serving" / "errors.py").exists()
    record = json.loads((folder / image_recipes.SERVING_RECORD).read_text())
    assert record["image"] == serving.image
    used = image_recipes.with_built_image(settings, folder).container.image
    assert used == serving.image


def test_failed_build_leaves_no_record(script: Script, folder: Path) -> None:
    script(
        "podman",
        f"[ $1 = build ] && {{ echo 'pip: no matching distribution'; exit 1; }}\n{BUILDER}",
    )
    settings = config(base_image="local/base", base_tag="7")
    Path("calls.images").write_text("local/base:7\n")
    base = build_base(settings, folder, print)
    with pytest.raises(OperatorError, match="no matching distribution"):
        build_serving(settings, base, folder, print)
    assert not (folder / image_recipes.SERVING_RECORD).exists()


def test_apptainer_gets_a_file_made_of_what_docker_or_podman_built(
    script: Script, folder: Path
) -> None:
    script("docker", "echo daemon is down >&2; exit 1")
    script("podman", BUILDER)
    calls = script("apptainer", "")
    settings = config(runtime="apptainer", base_image="local/base", base_tag="7")
    Path("calls.images").write_text("local/base:7\n")
    base = build_base(settings, folder, print)
    serving = build_serving(settings, base, folder, print)
    assert serving.file.endswith(".sif")
    assert calls.read_text().splitlines()[-1].startswith("apptainer build --force")
    assert image_recipes.with_built_image(settings, folder).container.image == serving.file


def test_source_is_compiled_in_the_devel_image(script: Script, folder: Path, plenty: None) -> None:
    script("podman", BUILDER)
    calls = script("git", "")
    base = build_base(config(source_commit=COMMIT), folder, print)
    assert base.reference.startswith("localhost/tensorrt-llm:0123456789ab-")
    text = calls.read_text()
    assert f"fetch --depth 1 origin {COMMIT}" in text
    assert text.index("lfs pull") < text.index("podman build")
    assert "devel:1.2.0" in (folder / "base.Dockerfile").read_text()
    before = text.count("podman build")
    build_base(config(source_commit=COMMIT), folder, print)
    assert calls.read_text().count("podman build") == before, "it is there already"


def test_git_lfs_is_needed_before_anything_is_fetched(
    script: Script, folder: Path, plenty: None
) -> None:
    script("podman", BUILDER)
    calls = script("git", "[ $1 = lfs ] && exit 1")
    with pytest.raises(OperatorError, match="git-lfs is missing") as caught:
        build_base(config(source_commit=COMMIT), folder, print)
    assert "apt-get install" in caught.value.remedy
    assert "fetch" not in calls.read_text()


def test_disk_space_is_needed_before_anything_is_fetched(
    script: Script, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 5 * 10**9))
    script("podman", BUILDER)
    calls = script("git", "")
    with pytest.raises(OperatorError, match=r"5 GB are free .* takes 63 GB"):
        build_base(config(source_commit=COMMIT), folder, print)
    assert "fetch" not in calls.read_text()


def test_unreachable_source_names_the_commit(script: Script, folder: Path, plenty: None) -> None:
    script("podman", BUILDER)
    script("git", 'case "$*" in *fetch*) echo Could not resolve host >&2; exit 128 ;; esac')
    with pytest.raises(OperatorError, match=f"{COMMIT} cannot be fetched: Could not resolve host"):
        build_base(config(source_commit=COMMIT), folder, print)


def test_source_commands_fetch_one_commit_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Run for real against a repository here: the second time changes nothing."""
    origin = tmp_path / "origin"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example", "-C", str(origin)]
    subprocess.run(["git", "init", "-q", str(origin)], check=True)
    (origin / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    checkout = tmp_path / "checkout"
    for _ in range(2):
        for command in source_commands(head.stdout.strip(), checkout):
            told = [part.replace(image_recipes.SOURCE, str(origin)) for part in command]
            if "lfs" not in told:
                subprocess.run(told, check=True, capture_output=True)
    assert (checkout / "file").read_text() == "1"


def test_machine_without_a_builder_is_told_what_to_install(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script("docker", "echo Cannot connect to the Docker daemon >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OperatorError) as caught:
        choose_builder(config(runtime="enroot").container)
    assert "Cannot connect to the Docker daemon" in caught.value.what
    assert "podman is not on PATH" in caught.value.what


def test_record_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"base\.json"):
        read_base(tmp_path / "base.json")


def test_what_the_base_has_stays_and_the_rest_comes_at_our_pins(tmp_path: Path) -> None:
    ours = tmp_path / "constraints.txt"
    ours.write_text("# a comment\nPyTest==0.0.1\nnonesuch-package==3\n")
    program = image_recipes.TEMPLATES / "keep_base.py"
    done = subprocess.run(
        [sys.executable, str(program), str(ours)], check=True, capture_output=True, text=True
    )
    pins = dict(line.split("==") for line in done.stdout.splitlines())
    assert pins["nonesuch-package"] == "3"
    assert pins["pytest"] == pytest.__version__
