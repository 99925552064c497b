"""Starting one program: proven ready, idempotent, and nothing left when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.config import Config
from serving.deploy.planning.program import Program
from serving.deploy.processes.launch import launch
from serving.deploy.processes.launchers import RUN
from serving.deploy.processes.markers import read_marker
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes
from serving.errors import OperatorError

READY = (
    "import json, logging, os, pathlib, time\n"
    "logging.warning('2026-01-01 00:00:00 x INFO serving.x: warming up')\n"
    "ready = {'launch_id': os.environ['LAUNCH_ID'], 'pid': os.getpid()}\n"
    "pathlib.Path('run/tool.ready').write_text(json.dumps(ready))\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    Supervisor().shutdown()
    assert not list(deployed_processes(RUN))


def program(source: str, **changes: Any) -> Program:
    """`tool`, which announces itself as workers do."""
    Path("tool.py").write_text(source)
    facts = {
        "name": "tool",
        "command": ["{python}", "tool.py"],
        "fingerprint": "one",
        "host": "127.0.0.1",
        "ports": {},
        "settings": "told\n",
        "settings_file": "run/tool.json",
        "engine": "",
        "start_s": 20.0,
        "stop_s": 2.0,
    }
    return Program(**{**facts, **changes})


def launched(wanted: Program) -> list[str]:
    lines: list[str] = []
    launch(wanted, Config(), lines.append)
    return lines


def test_ready_program_gets_a_marker_and_its_settings(here: Path) -> None:
    lines = launched(program(READY))
    marker = read_marker(here / "run" / "tool.up")
    assert marker is not None
    assert marker.pid == Supervisor().state()["tool"].pid
    assert marker.fingerprint == "one"
    assert (here / "run" / "tool.json").read_text() == "told\n"
    assert (here / "run" / "tool.json").stat().st_mode & 0o777 == 0o600
    assert lines[0].startswith("tool: started (pid ")


def test_second_launch_finds_it_running_and_a_change_restarts_it(here: Path) -> None:
    launched(program(READY))
    pid = Supervisor().state()["tool"].pid
    (here / "run" / "tool.up").unlink()
    assert launched(program(READY))[0] == f"tool: already running (pid {pid})"
    assert read_marker(here / "run" / "tool.up") is not None
    launched(program(READY, fingerprint="two"))
    assert Supervisor().state()["tool"].pid != pid


def test_program_that_dies_is_reported_at_once_with_its_last_words(here: Path) -> None:
    with pytest.raises(OperatorError) as caught:
        launched(program("raise SystemExit('the disk is full')"))
    assert "tool ended while it was starting (exit status 1)" in caught.value.what
    assert "the disk is full" in caught.value.what
    assert "logs/tool.log" in caught.value.remedy
    assert not (here / "run" / "tool.up").exists()


def test_program_that_explains_its_end_is_quoted_with_its_own_remedy(here: Path) -> None:
    source = (
        "import logging, sys\n"
        "logging.basicConfig(format='%(asctime)s x %(levelname)s %(name)s: %(message)s')\n"
        "print('noise')\n"
        "logging.critical('no memory is left\\nfor this model\\n  -> lower `a.b`')\n"
        "print('noise of an exit')\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(OperatorError) as caught:
        launched(program(source))
    assert caught.value.what == "tool could not start: no memory is left\nfor this model"
    assert caught.value.remedy == "lower `a.b`"


def test_program_that_never_becomes_ready_is_stopped(here: Path) -> None:
    with pytest.raises(OperatorError, match="not ready after 1 s") as caught:
        launched(program("import time; time.sleep(600)", start_s=1.0))
    assert "deployment.start_s" in caught.value.remedy
    assert Supervisor().state() == {}


def test_program_that_ran_before_goes_on_where_it_is_not_ready(here: Path) -> None:
    """A frontend of a service that lacks a role still serves."""
    launched(program(READY))
    pid = Supervisor().state()["tool"].pid
    (here / "run" / "tool.ready").unlink()
    with pytest.raises(OperatorError, match="not ready after 1 s"):
        launched(program(READY, start_s=1.0))
    assert Supervisor().state()["tool"].pid == pid


def test_readiness_of_an_earlier_launch_does_not_count(here: Path) -> None:
    old = "pathlib.Path('run/tool.ready').write_text('{\"launch_id\": \"old\"}')"
    with pytest.raises(OperatorError, match="not ready after 1 s"):
        launched(program(f"import pathlib, time\n{old}\ntime.sleep(600)", start_s=1.0))


def test_token_of_nats_is_made_once_and_only_ours_to_read(here: Path) -> None:
    wanted = program(READY, settings="token: @TOKEN@", settings_file="run/tool.conf")
    launched(wanted)
    token = here / "run" / "secrets" / "nats_token"
    first = token.read_text()
    assert len(first) > 30
    assert token.stat().st_mode & 0o777 == 0o600
    assert (here / "run" / "tool.conf").read_text() == f"token: {first}"
    launched(program(READY, settings=wanted.settings, fingerprint="two"))
    assert token.read_text() == first


def test_secrets_that_settings_name_are_made_once(here: Path) -> None:
    settings = '{"rpc_secret_file": "run/secrets/rpc_secret"}'
    launched(program(READY, settings=settings))
    secret = here / "run" / "secrets" / "rpc_secret"
    first = secret.read_text()
    assert len(first) > 30
    assert secret.stat().st_mode & 0o777 == 0o600
    launched(program(READY, settings=settings, fingerprint="two"))
    assert secret.read_text() == first
    assert [path.name for path in secret.parent.iterdir()] == ["rpc_secret"]
