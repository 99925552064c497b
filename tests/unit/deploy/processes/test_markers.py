"""Markers that stopped being true are removed, and true ones stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo
from serving.deploy.processes.markers import read_marker, remove_stale_markers, write_marker
from serving.deploy.processes.topology_record import (
    TopologyRecord,
    obsolete_programs,
    read_record,
    topology_record,
    write_record,
)
from unit.deploy.resolved import plan_for_test


def planned(engine: str = "e", topology: Any = "disagg", **raw: Any) -> DeploymentPlan:
    return plan_for_test(raw, topology, engine_fingerprint=engine)


def process(name: str, of: DeploymentPlan, **changes: Any) -> ProcessInfo:
    facts = {
        "name": name,
        "state": "RUNNING",
        "pid": 100 + sum(map(ord, name)),
        "started": 1.0,
        "exit_status": 0,
        "spawn_error": "",
        "fingerprint": of[name].fingerprint,
        "engine": of[name].engine,
        "launch_id": f"launch-{name}",
    }
    return ProcessInfo(**{**facts, **changes})


@pytest.fixture
def deployed(tmp_path: Path) -> tuple[Path, dict[str, ProcessInfo]]:
    """Everything of the default plan runs and is proven."""
    wanted = planned()
    running = {name: process(name, wanted) for name in wanted.fingerprints}
    for info in running.values():
        write_marker(info, tmp_path)
    write_record(topology_record(wanted), tmp_path)
    return tmp_path, running


def test_everything_true_stays(deployed: tuple[Path, dict[str, ProcessInfo]]) -> None:
    run, running = deployed
    assert remove_stale_markers(planned(), running, run) == []
    assert read_marker(run / "frontend.up") is not None
    assert read_record(run) == topology_record(planned())


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "EXITED", "pid": 0},
        {"state": "STOPPING"},
        {"pid": 1},
        {"launch_id": "another"},
        {"fingerprint": "another"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_marker_of_a_program_that_is_not_what_it_says_goes(
    deployed: tuple[Path, dict[str, ProcessInfo]], changes: dict[str, Any]
) -> None:
    run, running = deployed
    running["worker-decode-0"] = process("worker-decode-0", planned(), **changes)
    assert remove_stale_markers(planned(), running, run) == ["worker-decode-0.up"]
    assert not (run / "worker-decode-0.up").exists()


def test_without_supervisor_no_marker_stays(
    deployed: tuple[Path, dict[str, ProcessInfo]],
) -> None:
    run, _ = deployed
    assert len(remove_stale_markers(planned(), {}, run)) == 5
    assert not list(run.glob("*.up"))


def test_changed_config_removes_the_markers_it_concerns(
    deployed: tuple[Path, dict[str, ProcessInfo]],
) -> None:
    run, running = deployed
    assert remove_stale_markers(planned(router={"policy": "random"}), running, run) == [
        "frontend.up"
    ]


def test_garbage_marker_goes(deployed: tuple[Path, dict[str, ProcessInfo]]) -> None:
    run, running = deployed
    (run / "etcd.up").write_text("")
    assert remove_stale_markers(planned(), running, run) == ["etcd.up"]


def test_another_topology_makes_stop_obsolete_run(
    deployed: tuple[Path, dict[str, ProcessInfo]],
) -> None:
    run, running = deployed
    agg = planned(topology="agg")
    assert "topology.json" in remove_stale_markers(agg, running, run)
    assert obsolete_programs(topology_record(agg), running) == [
        "worker-prefill-0",
        "worker-decode-0",
    ]


def test_fewer_workers_make_stop_obsolete_run(tmp_path: Path) -> None:
    two = planned(workers={"decode": 2})
    running = {name: process(name, two) for name in two.fingerprints}
    write_record(topology_record(planned()), tmp_path)
    assert remove_stale_markers(planned(), running, tmp_path) == ["topology.json"]
    assert obsolete_programs(topology_record(planned()), running) == ["worker-decode-1"]


def test_everything_that_serves_another_engine_must_go() -> None:
    old, new = planned("old"), planned("new")
    running = {name: process(name, old) for name in old.fingerprints}
    assert obsolete_programs(topology_record(new), running) == [*old.workers, "frontend"]


def test_record_of_another_version_counts_as_missing(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "topology.json").write_text('{"topology": "ring"}')
    assert read_record(tmp_path) is None
    write_record(TopologyRecord(topology="agg", programs=[], engine_fingerprint=""), tmp_path)
    assert read_record(tmp_path) is not None
