"""The watcher with real processes under a real supervisord."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.deploy.healing import etcd_data
from serving.deploy.healing.etcd_data import set_etcd_data_aside
from serving.deploy.healing.kept_programs import KeptProgram, keep
from serving.deploy.healing.restart_policy import RestartPolicy
from serving.deploy.healing.watcher import Watcher
from serving.deploy.planning.program import Program
from serving.deploy.processes.launchers import RUN, ProcessInfo, ProgramSpec
from serving.deploy.processes.markers import read_marker, write_marker
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes
from serving.deploy.processes.topology_record import TopologyRecord, write_record
from serving.restarts import read_restart
from waiting import wait_until

BEATING = """
import json, os, pathlib, time
ready = pathlib.Path("run/worker-agg-0.ready")
if not pathlib.Path("broken").exists():
    ready.write_text(json.dumps({"launch_id": os.environ["LAUNCH_ID"]}))
    while not pathlib.Path("silent").exists():
        os.utime(ready)
        time.sleep(0.05)
    time.sleep(600)
raise SystemExit(3)
"""
NAME = "worker-agg-0"
PROGRAM = Program(
    name=NAME,
    command=[],
    fingerprint="f",
    host="",
    ports={},
    settings="",
    settings_file="",
    engine="",
    start_s=20.0,
    stop_s=2.0,
)


class Rig:
    """One program that is kept, and a watcher that looks when a test says so."""

    def __init__(self, **policy: object) -> None:
        restart = RestartPolicy(**{"restart": "on_failure", "silent_s": 2.0, **policy})  # type: ignore[arg-type]
        self.supervisor = Supervisor()
        self.supervisor.ensure()
        record = TopologyRecord(
            topology="agg", programs=[NAME], engine_fingerprint="", restart=restart
        )
        write_record(record, RUN)
        Path("beating.py").write_text(BEATING)
        self.spec = ProgramSpec(
            name=NAME, command=[sys.executable, "beating.py"], env={}, fingerprint="f", stop_s=2.0
        )
        self.first = self.supervisor.start(self.spec)
        wait_until(lambda: (RUN / f"{NAME}.ready").exists())
        write_marker(self.first, RUN)
        keep(KeptProgram(program=PROGRAM, spec=self.spec))
        self.watcher = Watcher(self.supervisor)
        self.watcher.look()

    @property
    def now(self) -> ProcessInfo:
        return self.supervisor.state()[NAME]

    def kill(self) -> None:
        os.kill(self.now.pid, signal.SIGKILL)
        wait_until(lambda: not self.now.running)

    def look_until(self, condition: object, deadline_s: float = 20.0) -> None:
        def looked() -> object:
            self.watcher.look()
            return condition()  # type: ignore[operator]

        wait_until(looked, deadline_s)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    Supervisor().shutdown()
    assert [p for p, _ in deployed_processes(RUN)] == []


def test_killed_program_is_a_new_launch_whose_marker_appears_when_it_is_ready(folder: Path) -> None:
    rig = Rig()
    rig.kill()
    rig.watcher.look()
    marker = read_marker(RUN / f"{NAME}.up")
    assert marker is None, "nothing is ready yet"
    rig.look_until(lambda: (RUN / f"{NAME}.up").exists())
    marker, info = read_marker(RUN / f"{NAME}.up"), rig.now
    assert marker is not None
    assert (marker.pid, marker.launch_id) == (info.pid, info.launch_id)
    assert marker.launch_id != rig.first.launch_id
    record = read_restart(NAME)
    assert (record.num_restarts, record.down) == (1, "")
    assert record.deaths[0].how.startswith("killed by SIGKILL")


def test_silent_program_is_killed_and_replaced(folder: Path) -> None:
    rig = Rig()
    Path("silent").touch()
    wait_until(lambda: time.time() - (RUN / f"{NAME}.ready").stat().st_mtime > 0.5)
    rig.look_until(lambda: rig.now.pid not in (0, rig.first.pid))
    assert "its event loop does nothing" in read_restart(NAME).deaths[0].how


def test_crash_loop_stops_with_its_reason(folder: Path) -> None:
    rig = Rig(max_restarts=2)
    Path("broken").touch()
    rig.kill()
    rig.look_until(lambda: read_restart(NAME).down)
    record = read_restart(NAME)
    assert record.down == "restarted 2 times in 3 minutes, last exit: exit status 3"
    assert record.num_restarts == 2
    for _ in range(3):
        rig.watcher.look()
    assert not rig.now.running
    assert read_restart(NAME) == record, "a death counts once"


def test_deliberate_stop_is_no_failure(folder: Path) -> None:
    rig = Rig()
    rig.supervisor.stop([NAME])
    for _ in range(3):
        rig.watcher.look()
    assert NAME not in rig.supervisor.state()
    assert read_restart(NAME).deaths == []
    assert rig.supervisor.restart(rig.spec) is None, "a stop that comes in between wins"
    assert NAME not in rig.supervisor.state()


def test_policy_never_leaves_a_dead_program_alone(folder: Path) -> None:
    rig = Rig(restart="never")
    rig.kill()
    for _ in range(3):
        rig.watcher.look()
    assert not rig.now.running
    assert (RUN / f"{NAME}.up").exists()


def test_damaged_data_of_etcd_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not set_etcd_data_aside()
    for content in ("first", "second"):
        etcd_data.DATA.mkdir(parents=True)
        (etcd_data.DATA / "wal").write_text(content)
        assert set_etcd_data_aside()
    assert (etcd_data.DAMAGED / "wal").read_text() == "second"
    assert not etcd_data.DATA.exists()
