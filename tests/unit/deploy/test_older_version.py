"""A folder that an older version served: its files count as missing, and its programs restart.

`tests/recorded_runs/` holds such folders as they were recorded, with every program running.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from serving.deploy.processes.launchers import ProcessInfo
from serving.deploy.processes.markers import read_marker, remove_stale_markers
from serving.deploy.processes.topology_record import read_record
from serving.deploy.report.service_spec import read_running_settings
from unit.deploy.resolved import plan_for_test

RECORDED = sorted((Path(__file__).parents[2] / "recorded_runs").iterdir())
PORTS = {
    "frontend": {"port": 18080},
    "etcd": {"port": 12379, "peer_port": 12380},
    "nats": {"port": 14222},
}
"""The ports that the recorded deployments used."""


@pytest.fixture(params=RECORDED, ids=lambda folder: folder.name)
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def running(run_dir: Path) -> dict[str, ProcessInfo]:
    """The recorded programs as supervisord would show them while they still run."""
    record = read_record(run_dir)
    assert record is not None
    programs = {}
    for name in record.programs:
        marker = read_marker(run_dir / f"{name}.up")
        assert marker is not None
        programs[name] = ProcessInfo(
            name=name,
            state="RUNNING",
            pid=marker.pid,
            started=marker.ready,
            exit_status=0,
            spawn_error="",
            fingerprint=marker.fingerprint,
            engine="" if name in {"etcd", "nats"} else record.engine_fingerprint,
            launch_id=marker.launch_id,
        )
    return programs


def test_settings_of_an_older_version_count_as_missing(run_dir: Path) -> None:
    assert read_running_settings(run_dir) == (None, [])


def test_programs_of_an_older_version_restart_and_etcd_and_nats_go_on(run_dir: Path) -> None:
    record = read_record(run_dir)
    assert record is not None
    plan = plan_for_test(PORTS, record.topology, engine_fingerprint=record.engine_fingerprint)
    removed = remove_stale_markers(plan, running(run_dir), run_dir)
    assert sorted(removed) == ["frontend.up", "worker-decode-0.up", "worker-prefill-0.up"]
