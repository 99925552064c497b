"""`run/topology.json`: what a person last asked to run here, and which programs do not belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.config import Topology
from serving.deploy.healing.restart_policy import RestartPolicy
from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo

TOPOLOGY_FILE = "topology.json"
DEPLOYED_FILE = "deployed.json"
"""The same record, where Snakemake does not know it. It removes the output of a rule that is to run
again, and a run that fails before that rule would leave no record of what still serves."""


class TopologyRecord(Struct, frozen=True, kw_only=True):
    """A deployment plan without its programs' settings. The watcher reads `restart` here, so that
    a change of it restarts no program."""

    topology: Topology
    programs: list[str]
    engine_fingerprint: str
    restart: RestartPolicy = RestartPolicy()


def topology_record(plan: DeploymentPlan, restart: RestartPolicy | None = None) -> TopologyRecord:
    return TopologyRecord(
        topology=plan.topology,
        programs=list(plan.fingerprints),
        engine_fingerprint=plan.engine_fingerprint,
        restart=restart or RestartPolicy(),
    )


def write_record(record: TopologyRecord, run_dir: Path) -> None:
    """Appears whole: other commands may read it at the same time."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    for name in (DEPLOYED_FILE, TOPOLOGY_FILE):
        temporary = run_dir / f"{name}.tmp"
        temporary.write_bytes(text)
        temporary.replace(run_dir / name)


def remove_record(run_dir: Path) -> None:
    """Nothing is deployed any more."""
    for name in (TOPOLOGY_FILE, DEPLOYED_FILE):
        (run_dir / name).unlink(missing_ok=True)


def read_record(run_dir: Path) -> TopologyRecord | None:
    """What is deployed, or None when nothing is."""
    for name in (TOPOLOGY_FILE, DEPLOYED_FILE):
        try:
            return msgspec.json.decode((run_dir / name).read_bytes(), type=TopologyRecord)
        except (OSError, msgspec.MsgspecError):
            continue
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
