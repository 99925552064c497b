"""Is the whole deployment ready at this moment? Asks every program again, and waits for none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serving.deploy.planning.program import DeploymentPlan
from serving.deploy.processes.launchers import ProcessInfo
from serving.deploy.processes.markers import is_true, read_marker
from serving.deploy.processes.readiness import probe_for


def unproven(
    plan: DeploymentPlan, running: Mapping[str, ProcessInfo], run_dir: Path
) -> dict[str, str]:
    """The programs of `plan` that do not serve now, and what is missing; empty when all do."""
    missing = {}
    for program in plan.programs:
        info = running.get(program.name)
        if info is None or not info.running:
            missing[program.name] = "not running"
        elif not is_true(
            read_marker(run_dir / f"{program.name}.up"), info, plan.fingerprints[program.name]
        ):
            missing[program.name] = "not as configured, or not proven ready"
        elif reason := probe_for(program.name)(program, info.launch_id):
            missing[program.name] = reason
    return missing
