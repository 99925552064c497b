"""`run/topology.json`: what a person last asked to run here, and which programs do not belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import Topology
from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo

TOPOLOGY_FILE = "topology.json"


class TopologyRecord(Struct, frozen=True, kw_only=True):
    """A deployment plan without its programs' settings."""

    topology: Topology
    programs: list[str]
    engine_fingerprint: str


def topology_record(plan: DeploymentPlan) -> TopologyRecord:
    return TopologyRecord(
        topology=plan.topology,
        programs=list(plan.fingerprints),
        engine_fingerprint=plan.engine_fingerprint,
    )


def write_record(record: TopologyRecord, run_dir: Path) -> None:
    """Appears whole: other commands may read it at the same time."""
    path = run_dir / TOPOLOGY_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    temporary.replace(path)


def read_record(run_dir: Path) -> TopologyRecord | None:
    """What is deployed, or None when nothing is."""
    try:
        return msgspec.json.decode((run_dir / TOPOLOGY_FILE).read_bytes(), type=TopologyRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def obsolete_programs(wanted: TopologyRecord, known: Mapping[str, ProcessInfo]) -> list[str]:
    """Programs to stop before others start: they are not in `wanted`, or serve another engine.

    Workers of two engines cannot serve together, and together they may not fit into memory.
    """
    engines = {"", wanted.engine_fingerprint}
    return [
        name
        for name, info in known.items()
        if name not in wanted.programs or (info.running and info.engine not in engines)
    ]
