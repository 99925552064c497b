"""Markers: `run/{program}.up` says which process was proven ready, and nothing more.

A marker is Snakemake's evidence, not the truth; the truth is what supervisord runs. So before a
run that serves, `sweep` removes every marker that has stopped being true.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Topology
from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo

RECORD = "topology.json"
JOINED = "joined.json"


class Marker(Struct, frozen=True, kw_only=True):
    """`ready` is the Unix time at which the program was proven ready."""

    program: str
    pid: int
    launch_id: str
    fingerprint: str
    ready: float


class Record(Struct, frozen=True, kw_only=True):
    """`run/topology.json`: what was last asked to run here."""

    topology: Topology
    programs: list[str]
    engine_fingerprint: str


def write_marker(info: ProcessInfo, run_dir: Path) -> None:
    marker = Marker(
        program=info.name,
        pid=info.pid,
        launch_id=info.launch_id,
        fingerprint=info.fingerprint,
        ready=time.time(),
    )
    _write(run_dir / f"{info.name}.up", marker)


def read_marker(path: Path) -> Marker | None:
    """None when there is none, or it is not one of ours."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError):
        return None


def record_of(plan: DeploymentPlan) -> Record:
    return Record(
        topology=plan.topology,
        programs=list(plan.fingerprints),
        engine_fingerprint=plan.engine_fingerprint,
    )


def write_record(record: Record, run_dir: Path) -> None:
    _write(run_dir / RECORD, record)


def read_record(run_dir: Path) -> Record | None:
    """What is deployed, or None when nothing is."""
    try:
        return msgspec.json.decode((run_dir / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def write_joined(config: dict[str, Any], run_dir: Path) -> None:
    """Keep the configuration of a node that joined, for its other commands."""
    _write(run_dir / JOINED, config)


def read_joined(run_dir: Path) -> dict[str, Any] | None:
    """None on a machine that did not join."""
    try:
        config: dict[str, Any] = msgspec.json.decode((run_dir / JOINED).read_bytes())
    except (OSError, msgspec.MsgspecError):
        return None
    return config


def no_longer_wanted(wanted: Record, known: Mapping[str, ProcessInfo]) -> list[str]:
    """Programs to stop before others start: not asked for, or serving another engine.

    Workers of two engines cannot serve together, and together they may not fit into memory.
    """
    engines = {"", wanted.engine_fingerprint}
    return [
        name
        for name, info in known.items()
        if name not in wanted.programs or (info.running and info.engine not in engines)
    ]


def sweep(plan: DeploymentPlan, running: Mapping[str, ProcessInfo], run_dir: Path) -> list[str]:
    """Remove what is not true; returns the names of what was removed.

    A marker is true when its process runs under our supervisord, and runs what is wanted now.
    The record of the topology goes when something must be stopped, so that `stop_obsolete` runs.
    """
    removed = []
    wanted = plan.fingerprints
    for path in run_dir.glob("*.up"):
        marker, info = read_marker(path), running.get(path.stem)
        true = (
            marker is not None
            and info is not None
            and info.running
            and marker.pid == info.pid
            and marker.launch_id == info.launch_id
            and info.fingerprint == wanted.get(path.stem, info.fingerprint)
        )
        if not true:
            path.unlink(missing_ok=True)
            removed.append(path.name)
    record = read_record(run_dir)
    outdated = record is not None and record.topology != plan.topology
    if outdated or no_longer_wanted(record_of(plan), running):
        (run_dir / RECORD).unlink(missing_ok=True)
        removed.append(RECORD)
    return removed


def _write(path: Path, content: Struct | dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    temporary.replace(path)
