"""The deployment of one Snakemake run: what the Snakefile needs to know to say what must exist.

Called while the Snakefile is parsed, so it imports nothing heavy. Before a run that serves, it
also removes markers that are no longer true and makes sure that the ports are free. Any other run,
above all a dry run, leaves the disk as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import ResolvedConfig
from serving.config.resolve import gpus_per_worker, is_joining_node, topology_roles, uses_slurm
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.healing.restart_policy import restart_policy
from serving.deploy.planning.config_file import has_sections
from serving.deploy.planning.gpu_assignment import existing_gpus, usable_gpus
from serving.deploy.planning.invocation import (
    JOIN,
    SERVE,
    Invocation,
    from_terminal,
    read_command_line,
)
from serving.deploy.planning.plan import plan_deployment
from serving.deploy.planning.program import DeploymentPlan, Program
from serving.deploy.planning.resolve import resolve
from serving.deploy.planning.run_state import config_of_main_process, keep_for_subprocesses
from serving.deploy.planning.source_digest import SCRIPTS, source_digest
from serving.deploy.processes import ports
from serving.deploy.processes.launchers import RUN
from serving.deploy.processes.markers import remove_stale_markers
from serving.deploy.processes.proof import unproven
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.topology_record import (
    TopologyRecord,
    read_record,
    topology_record,
)
from serving.deploy.report.announcement import (
    announce_incomplete,
    announce_joined,
    announce_service,
)
from serving.engine.integrity import remove_unusable
from serving.errors import ConfigError, OperatorError
from serving.gpus import Links, nvlink_pairs
from serving.protocol import Role


class Deployment(Struct, frozen=True, kw_only=True):
    """`recorded` is what was deployed here before this run."""

    config: ResolvedConfig
    plan: DeploymentPlan
    invocation: Invocation
    recorded: TopologyRecord | None

    @property
    def roles(self) -> tuple[Role, ...]:
        return topology_roles(self.config.topology)

    @property
    def first_workers(self) -> list[str]:
        """The first program of each role that this machine runs."""
        first = {f"{role}": "" for role in self.roles}
        for name in reversed(self.plan.workers):
            first[name.split("-")[1]] = name
        return [name for name in first.values() if name]

    @property
    def checks(self) -> list[str]:
        """The checks that this deployment needs."""
        # TensorRT-LLM brings its own UCX: a check of ours proves nothing about it.
        own_ucx = self.config.engine.backend == "torch"
        moves_kv = "decode" in self.roles and own_ucx and self.config.kv_transfer.transport == "ucx"
        contained = self.config.container.runtime != "none"
        gpu = ["gpu"] * (not uses_slurm(self.config))  # Slurm jobs compute on other machines
        return ["host", *gpu, *["ucx"] * moves_kv, *["container"] * contained]

    @property
    def build_checks(self) -> list[str]:
        """The checks that a build waits for: a build with tools of an image needs the image."""
        inside = self.config.engine.backend == "tensorrt_llm" and "container" in self.checks
        return ["container"] if inside else []

    @property
    def record(self) -> TopologyRecord:
        """What to write down as deployed."""
        return topology_record(self.plan, restart_policy(self.config))

    @property
    def starts_for_smoke_test(self) -> bool:
        """A smoke test starts a missing service; it reports failures of a running one."""
        return self.invocation.serves or self.recorded is None

    @property
    def will_serve(self) -> bool:
        smoke_test = "smoke_test" in self.invocation.targets and self.starts_for_smoke_test
        return self.invocation.serves or smoke_test

    def announcement(self) -> str:
        """What this machine serves by now, as far as every program proves it at this moment."""
        running = {**Supervisor().state(), **SlurmJobs().state()} if RUN.is_dir() else {}
        if missing := unproven(self.plan, running, RUN):
            target = next(iter(SERVE.intersection(self.invocation.targets)), "serve")
            return announce_incomplete(missing, JOIN if self.invocation.joins else target)
        if is_joining_node(self.config):
            return announce_joined(self.config, self.plan.workers)
        return announce_service(self.config)


def prepare(raw: Mapping[str, Any], *, main: bool) -> Deployment:
    """The deployment that the config keys `raw` and the command line ask for.

    `main` is False in a sub-process of Snakemake, which takes over the main process's
    configuration. Raises OperatorError for whatever makes the run impossible.
    """
    _export_package()
    invocation = read_command_line(sys.argv[1:]) if main and from_terminal() else Invocation()
    for path in invocation.config_files:
        has_sections(Path(path))
    recorded = read_record(RUN)
    config = None if main else config_of_main_process()
    config = config or resolve(raw, invocation, recorded)
    gpus = _gpus_to_hand_out(config)
    deployment = Deployment(
        config=config,
        plan=plan_deployment(
            config,
            gpus=gpus,
            nvlinks=nvlinks_between(config, gpus),
            code={name: source_digest(name) for name in ("worker", "frontend")},
        ),
        invocation=invocation,
        recorded=recorded,
    )
    if main and invocation.executes:
        keep_for_subprocesses(config)
        if deployment.will_serve:
            model_file = Path("results/models") / config.model_key / "model.json"
            remove_unusable(Path(config.engine_dir), model_file)
            _remove_stale_markers(deployment.plan)
            _claim_ports(deployment.plan)
    return deployment


def encode(parameter: Program | TopologyRecord) -> str:
    """A parameter of a rule as text, which Snakemake compares between runs."""
    return msgspec.json.encode(parameter).decode()


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def nvlinks_between(config: ResolvedConfig, gpus: Sequence[int]) -> Links:
    """NVLink pairs, asked from the driver only when workers of several GPUs need neighbours."""
    several = max(gpus_per_worker(config).values(), default=0) > 1
    return nvlink_pairs() if several and len(gpus) > 2 else frozenset()


def _export_package() -> None:
    """Rule scripts, and the programs they start, import this code and no other installed copy."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in before if path and path != str(SCRIPTS)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *others])


def _gpus_to_hand_out(config: ResolvedConfig) -> list[int]:
    """Indices; none on CPU. GPUs that `workers.gpus` names must exist even when `auto` finds none."""
    named = config.engine.device == "auto" and bool(config.workers.gpus)
    if uses_slurm(config) or not (config.device == "cuda" or named):
        return []
    return usable_gpus(config.workers.gpus, existing_gpus(), config.engine.backend)


def _remove_stale_markers(plan: DeploymentPlan) -> None:
    """Markers then agree with what runs."""
    if RUN.is_dir():
        remove_stale_markers(plan, {**Supervisor().state(), **SlurmJobs().state()}, RUN)


def _claim_ports(plan: DeploymentPlan) -> None:
    """Raises OperatorError when a program that is to start cannot have its ports."""
    for program in plan.programs:
        if (RUN / f"{program.name}.up").exists():
            continue
        try:
            ports.require_ports(program.host, program.ports, RUN)
        except ConfigError:
            raise
        except OperatorError as exc:
            raise OperatorError(f"{program.name}: {exc.what}", remedy=exc.remedy) from None
