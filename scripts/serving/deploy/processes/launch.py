"""Start one program and prove it ready: the work of the `start_*` rules.

Starting is idempotent: a program that already runs as wanted is only proven ready again. A program
that was started here and does not become ready is stopped, so nothing half started stays behind. One
that ran before goes on: it may serve with what it has.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

from serving.config import Config
from serving.config.process import WorkerSettings
from serving.config.resolve import gpus_per_worker, uses_slurm
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.cluster.slurm_commands import inside_allocation, step_command
from serving.deploy.containers.run_command import runs_in_container
from serving.deploy.containers.worker_command import contain_worker
from serving.deploy.healing.etcd_data import DAMAGED, set_etcd_data_aside
from serving.deploy.healing.kept_programs import KeptProgram, keep, let_go, remove_traces
from serving.deploy.healing.watcher_program import ensure_watcher
from serving.deploy.planning.control_services import NATS_TOKEN
from serving.deploy.planning.gpu_assignment import existing_gpus, usable_gpus
from serving.deploy.planning.plan import worker_environment
from serving.deploy.planning.program import Program
from serving.deploy.planning.source_digest import SCRIPTS
from serving.deploy.processes import ports
from serving.deploy.processes.launchers import LOGS, RUN, Launcher, ProcessInfo, ProgramSpec
from serving.deploy.processes.markers import write_marker
from serving.deploy.processes.program_log import ProgramLog
from serving.deploy.processes.readiness import require_first_answer
from serving.deploy.processes.startup import wait_for_resources, wait_until_ready
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.security.secret_files import (
    NATS_TOKEN_FILE,
    ensure_named_secrets,
    ensure_secret,
)
from serving.errors import OperatorError
from serving.host_cpus import host_cpus
from serving.progress import Report
from serving.restarts import forget_restarts

_SET_ON_THE_NODE = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
"""Variables that a Slurm job sets by itself."""


def launch(program: Program, config: Config, report: Report) -> None:
    """Have `program` running and ready, and write its marker. Raises OperatorError."""
    started = time.monotonic()
    launcher = _launcher(program, config)
    launcher.ensure()
    log = ProgramLog(LOGS / f"{program.name}.log")
    info = launcher.state().get(program.name)
    runs = info is not None and info.running and info.fingerprint == program.fingerprint
    with nullcontext() if runs else _stopped_on_failure(launcher, program.name):
        if info is not None and runs:
            report(f"{program.name}: already running ({_location(info)})")
        else:
            info = _start(launcher, program, config)
            report(f"{program.name}: started ({_location(info)}), log: {log.path}")
        wait_for_resources(launcher, program.name, config, report)
        try:
            wait_until_ready(launcher, program, info, log, report)
        except OperatorError as exc:
            if program.name != "etcd":
                raise
            info = _start_etcd_empty(launcher, program, config, report, exc)
            wait_until_ready(launcher, program, info, log, report)
        if program.name == "frontend":
            require_first_answer(program)
    write_marker(info, RUN)
    _keep_running(launcher, program, config)
    offer = _offer(program.name)
    report(f"{program.name}: ready after {time.monotonic() - started:.1f} s{offer}")


def _start_etcd_empty(
    launcher: Launcher, program: Program, config: Config, report: Report, failure: OperatorError
) -> ProcessInfo:
    """It holds leases only, so data that it cannot use are no loss. Raises `failure` without any."""
    launcher.stop([program.name])
    if not set_etcd_data_aside():
        raise failure
    report(f"{program.name}: {failure.what.splitlines()[0]}")
    report(f"{program.name}: its data are set aside in {DAMAGED}; it starts empty")
    return _start(launcher, program, config)


def _offer(name: str) -> str:
    """What a worker has announced beside that it is ready; empty for other programs."""
    try:
        announced = msgspec.json.decode((RUN / f"{name}.ready").read_bytes())
        context, pool = announced["max_model_len"], announced["kv_cache_tokens"]
    except (OSError, KeyError, msgspec.DecodeError):
        return ""
    return f", context of {context} tokens, KV pool of {pool}"


@contextmanager
def _stopped_on_failure(launcher: Launcher, name: str) -> Iterator[None]:
    try:
        yield
    except OperatorError:
        let_go([name])
        launcher.stop([name])
        raise


def _launcher(program: Program, config: Config) -> Launcher:
    """Inside of an allocation, workers are steps of it, and supervisord starts them."""
    if _is_slurm_worker(program, config) and not inside_allocation():
        return SlurmJobs(config)
    return Supervisor()


def _keep_running(launcher: Launcher, program: Program, config: Config) -> None:
    """Let the watcher start it again, from now on."""
    spec = _slurm_spec(_spec(program, config), program, config)
    supervisor = launcher if isinstance(launcher, Supervisor) else Supervisor()
    keep(KeptProgram(program=program, spec=supervisor.with_environment(spec)))
    ensure_watcher(supervisor)


def _location(info: ProcessInfo) -> str:
    return info.location or f"pid {info.pid}"


def _is_slurm_worker(program: Program, config: Config) -> bool:
    return program.name.startswith("worker-") and uses_slurm(config)


def _start(launcher: Launcher, program: Program, config: Config) -> ProcessInfo:
    let_go([program.name])
    launcher.stop([program.name])
    forget_restarts(program.name)
    ports.require_ports(program.host, program.ports, RUN)
    _write_settings(program)
    spec = _spec(program, config)
    return launcher.start(_slurm_spec(spec, program, config))


def _spec(program: Program, config: Config) -> ProgramSpec:
    """Command and environment. UCX settings come from the environment of the workflow."""
    command = [part.replace("{python}", sys.executable) for part in program.command]
    removal: list[str] = []
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPTS)), "PYTHONUNBUFFERED": "1"}
    if program.name.startswith("worker-"):
        worker = msgspec.json.decode(program.settings, type=WorkerSettings)
        cores = host_cpus()
        gpus = usable_gpus(config.workers.gpus, existing_gpus()) if worker.gpus else []
        env |= worker_environment(config, worker, gpus, cores)
        env |= {key: value for key, value in os.environ.items() if key.startswith("UCX_")}
        if runs_in_container(config.container, worker.role):
            contained = contain_worker(config.container, program.name, worker, env)
            command, env, removal = contained.command, contained.env, contained.removal
    if program.name == "etcd" and os.uname().machine == "aarch64":
        env["ETCD_UNSUPPORTED_ARCH"] = "arm64"  # etcd before 3.5 asks for this
    return ProgramSpec(
        name=program.name,
        command=command,
        env=env,
        fingerprint=program.fingerprint,
        engine=program.engine,
        stop_s=program.stop_s,
        removal=removal,
        owns_log=program.name in {"etcd", "nats"},
    )


def _slurm_spec(spec: ProgramSpec, program: Program, config: Config) -> ProgramSpec:
    """`spec` for a worker that starts on a node of Slurm's choice; unchanged for other programs."""
    if not _is_slurm_worker(program, config):
        return spec
    worker = msgspec.json.decode(program.settings, type=WorkerSettings)
    num_gpus = gpus_per_worker(config)[worker.role] if worker.device == "cuda" else 0
    network = [config.slurm.network] if config.slurm.network else []
    command = [
        *(sys.executable, "-m", "serving.deploy.cluster.slurm_worker"),
        *(program.settings_file, config.cluster.address or "", *network),
    ]
    if inside_allocation():
        # srun passes signals on and ends with its step, so it stands for the worker.
        command = [*step_command(config, num_gpus), *command]
    env = {key: value for key, value in spec.env.items() if key not in _SET_ON_THE_NODE}
    return msgspec.structs.replace(spec, command=command, env=env, num_gpus=num_gpus)


def _write_settings(program: Program) -> None:
    """Remove the files of an earlier start, and write the settings and the secrets they name."""
    remove_traces(program.name)
    text = program.settings
    ensure_named_secrets(text + " ".join(program.command), program.host)
    if not program.settings_file:
        return
    if NATS_TOKEN in text:
        text = text.replace(NATS_TOKEN, ensure_secret(NATS_TOKEN_FILE))
    path = Path(program.settings_file)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)
