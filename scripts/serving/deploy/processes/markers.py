"""Markers: `run/{program}.up` says which process was proven ready, and nothing more.

Snakemake takes a marker as evidence, but only the launcher knows what runs. So before a run that
serves, `remove_stale_markers` removes every marker that is not true any more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo
from serving.deploy.processes.topology_record import (
    TOPOLOGY_FILE,
    obsolete_programs,
    read_record,
    topology_record,
)


class Marker(Struct, frozen=True, kw_only=True):
    """`ready` is the Unix time at which the program was proven ready."""

    program: str
    pid: int
    launch_id: str
    fingerprint: str
    ready: float


def write_marker(info: ProcessInfo, run_dir: Path) -> None:
    """The process of `info` is ready now. The file appears whole."""
    marker = Marker(
        program=info.name,
        pid=info.pid,
        launch_id=info.launch_id,
        fingerprint=info.fingerprint,
        ready=time.time(),
    )
    path = run_dir / f"{info.name}.up"
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(marker), indent=2) + b"\n")
    temporary.replace(path)


def read_marker(path: Path) -> Marker | None:
    """None when there is no file, or when it is not a marker."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_stale_markers(
    plan: DeploymentPlan, running: Mapping[str, ProcessInfo], run_dir: Path
) -> list[str]:
    """Remove markers that are not true any more; returns the names of the removed files.

    A marker is true when its process still runs, with the fingerprint that `plan` wants. The record
    of the topology is removed when programs must be stopped, so that `stop_obsolete` runs.
    """
    removed = []
    for path in run_dir.glob("*.up"):
        wanted = plan.fingerprints.get(path.stem)
        if not is_true(read_marker(path), running.get(path.stem), wanted):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    record = read_record(run_dir)
    outdated = record is not None and record.topology != plan.topology
    if outdated or obsolete_programs(topology_record(plan), running):
        (run_dir / TOPOLOGY_FILE).unlink(missing_ok=True)
        removed.append(TOPOLOGY_FILE)
    return removed


def is_true(marker: Marker | None, info: ProcessInfo | None, wanted: str | None) -> bool:
    """`wanted` is the program's fingerprint in the plan, None when the plan does not have it."""
    return (
        marker is not None
        and info is not None
        and info.running
        and marker.pid == info.pid
        and marker.launch_id == info.launch_id
        and wanted in (None, info.fingerprint)
    )
