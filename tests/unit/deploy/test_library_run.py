"""Programs of the library run on this host, their lines passed on as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.config import parse
from serving.deploy.containers import library_run
from serving.deploy.containers.library_run import LibraryRun
from serving.deploy.containers.worker_command import Contained
from serving.engine.trtllm.build.installed import PYTHON, probe_library
from serving.errors import OperatorError


def run(tmp_path: Path, gpus: tuple[int, ...] = (), **container: Any) -> LibraryRun:
    raw = {"engine": {"backend": "tensorrt_llm"}, "container": container}
    return LibraryRun(parse(raw), gpus=gpus, writable=[tmp_path])


def test_both_streams_are_one_text_and_go_to_progress(tmp_path: Path) -> None:
    lines: list[str] = []
    script = "import sys; print('one', flush=True); print('two', file=sys.stderr); sys.exit(3)"
    done = run(tmp_path)([PYTHON, "-c", script], progress=lines.append)
    assert (done.returncode, done.stdout, lines) == (3, "one\ntwo\n", ["one", "two"])


def test_gpus_are_those_that_were_handed_out(tmp_path: Path) -> None:
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert run(tmp_path, (2, 0))([PYTHON, "-c", script]).stdout == "2,0\n"
    assert run(tmp_path)([PYTHON, "-c", script]).stdout == "\n"


def test_missing_program_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no-such-tool cannot be started"):
        run(tmp_path)(["no-such-tool"])


def test_installed_library_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("print('[TensorRT-LLM] hello'); __version__ = '1.2.1'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert str(probe_library(run(tmp_path)).version) == "1.2.1"


def test_container_is_entered_when_workers_run_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def wrap(container: Any, argv: list[str], **given: Any) -> Contained:
        asked.update(given, argv=argv)
        return Contained(command=["echo", "inside"], env={}, removal=[])

    monkeypatch.setattr(library_run, "wrap", wrap)
    inside = run(tmp_path, (1,), runtime="podman", image="x", python="/opt/python")
    assert inside([PYTHON, "tool"]).stdout == "inside\n"
    assert asked["argv"] == ["/opt/python", "tool"]
    assert asked["env"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert asked["writable"] == [tmp_path]


def test_container_of_a_killed_build_is_removed_before_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"

    def wrap(container: Any, argv: list[str], **given: Any) -> Contained:
        say = ["sh", "-c", 'echo "$0" >> "$1"']
        return Contained(
            command=[*say, "start", str(told)], env={}, removal=[*say, "remove", str(told)]
        )

    monkeypatch.setattr(library_run, "wrap", wrap)
    inside = run(tmp_path, runtime="podman", image="x")
    inside(["tool"])
    assert told.read_text().split() == ["remove", "start"]

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        library_run,
        "wrap",
        lambda *_, **given: Contained(
            command=["sh", "-c", "echo working; exec sleep 60"],
            env={},
            removal=wrap(None, []).removal,
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        inside(["tool"], progress=interrupt)
    assert told.read_text().split() == ["remove", "start", "remove", "remove"]


def test_roles_outside_build_outside(tmp_path: Path) -> None:
    outside = run(tmp_path, runtime="podman", image="x", roles=["agg"])
    assert outside(["echo", "here"]).stdout == "here\n"
