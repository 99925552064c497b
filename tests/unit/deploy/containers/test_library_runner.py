"""Programs of the library run on this host, their lines passed on as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.config import parse
from serving.deploy.containers.library_runner import LibraryRunner
from serving.engine.trtllm.build.installed import PYTHON, probe_library
from serving.errors import OperatorError
from unit.deploy.fake_programs import Script


def run(tmp_path: Path, gpus: tuple[int, ...] = (), **container: Any) -> LibraryRunner:
    raw = {"engine": {"backend": "tensorrt_llm"}, "container": container}
    return LibraryRunner(parse(raw), gpus=gpus, writable=[tmp_path])


def test_both_streams_are_one_text_and_go_to_progress(tmp_path: Path) -> None:
    lines: list[str] = []
    script = "import sys; print('one', flush=True); print('two', file=sys.stderr); sys.exit(3)"
    done = run(tmp_path)([PYTHON, "-c", script], report=lines.append)
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
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = script("podman", "[ $1 = rm ] || echo inside")
    inside = run(tmp_path, (1,), runtime="podman", image="x", python="/opt/python")
    assert inside([PYTHON, "tool"]).stdout == "inside\n"
    started = calls.read_text().splitlines()[-1]
    assert started.endswith("x /opt/python tool")
    assert "--device=nvidia.com/gpu=1" in started
    assert f"src={tmp_path},dst={tmp_path} " in started


def test_container_of_a_killed_build_is_removed_before_the_next_one_starts(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = script("podman", "")
    inside = run(tmp_path, runtime="podman", image="x")
    inside(["tool"])
    assert [line.split()[1] for line in calls.read_text().splitlines()] == ["rm", "run"]

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    script("podman", "[ $1 = rm ] || { echo working; exec sleep 60; }")
    with pytest.raises(KeyboardInterrupt):
        inside(["tool"], report=interrupt)
    used = [line.split()[1] for line in calls.read_text().splitlines()]
    assert used == ["rm", "run", "rm", "run", "rm"]


def test_roles_outside_build_outside(tmp_path: Path) -> None:
    outside = run(tmp_path, runtime="podman", image="x", roles=["agg"])
    assert outside(["echo", "here"]).stdout == "here\n"
