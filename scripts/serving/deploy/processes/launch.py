"""Start one program and prove it ready; what the `start_*` rules do.

Starting is idempotent: a program that runs as it should is only proven ready again. A program
that does not become ready is stopped, so that nothing half started stays behind.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import msgspec

from serving.config import Config
from serving.config.process import WorkerSettings
from serving.config.resolve import gpus_per_worker, uses_slurm
from serving.deploy.cluster.slurm import SlurmJobs, inside_allocation, step_command
from serving.deploy.containers.run_command import runs_in_container
from serving.deploy.containers.worker_command import contain_worker
from serving.deploy.planning.control_services import NATS_TOKEN
from serving.deploy.planning.gpu_assignment import existing_gpus, usable_gpus
from serving.deploy.planning.plan import worker_environment
from serving.deploy.planning.program import Program
from serving.deploy.planning.source_digest import SCRIPTS
from serving.deploy.processes import ports
from serving.deploy.processes.credentials import NATS_TOKEN_FILE, ensure, ensure_named
from serving.deploy.processes.markers import write_marker
from serving.deploy.processes.readiness import first_answer, probe_for
from serving.deploy.processes.supervisor import LOGS, RUN, ProcessInfo, ProgramSpec, Supervisor
from serving.errors import OperatorError
from serving.progress import Report

TELL_EVERY_S = 5.0
LAST_LINES = 15
_PROBE_S = 0.1
_PEND_S = 1.0
_OF_THE_NODE = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
"""What a job finds out on its node."""
_LINE_HEAD = re.compile(r"^\S+ \S+ \S+ (?:INFO|WARNING|ERROR|CRITICAL|DEBUG) \S+: ")
_OWN_HEAD = re.compile(r"^\S+ \S+ \S+ CRITICAL \S+: ")
"""Our programs say only one thing at this level: the OperatorError that they end with."""
_REMEDY = "  -> "


def launch(program: Program, config: Config, report: Report) -> None:
    """Have `program` run and ready, and write its marker. Raises OperatorError."""
    started = time.monotonic()
    supervisor: Supervisor | SlurmJobs = Supervisor()
    if _is_job(program, config) and not inside_allocation():
        supervisor = SlurmJobs(config)
    supervisor.ensure()
    info = supervisor.state().get(program.name)
    log = LOGS / f"{program.name}.log"
    log_from = log.stat().st_size if log.exists() else 0
    if info is not None and info.running and info.fingerprint == program.fingerprint:
        report(f"{program.name}: already running ({_place(info)})")
    else:
        supervisor.stop([program.name])
        ports.claim(program.host, program.ports, RUN)
        _write_settings(program)
        info = _start(supervisor, program, config)
        report(f"{program.name}: started ({_place(info)}), log: {log}")
    try:
        _wait_ready(supervisor, program, info, log_from, config, report)
        if program.name == "frontend":
            first_answer(program)
    except OperatorError:
        supervisor.stop([program.name])
        raise
    write_marker(info, RUN)
    report(f"{program.name}: ready after {time.monotonic() - started:.1f} s")


def _place(info: ProcessInfo) -> str:
    return info.place or f"pid {info.pid}"


def _start(supervisor: Supervisor | SlurmJobs, program: Program, config: Config) -> ProcessInfo:
    spec = _spec(program, config)
    if not _is_job(program, config):
        assert isinstance(supervisor, Supervisor)
        return supervisor.start(spec)
    process = msgspec.json.decode(program.settings, type=WorkerSettings)
    on_gpus = gpus_per_worker(config)[process.role] if process.device == "cuda" else 0
    network = [config.slurm.network] if config.slurm.network else []
    head = config.cluster.address or ""
    module = ["-m", "serving.deploy.cluster.slurm_worker", program.settings_file, head, *network]
    env = {key: value for key, value in spec.env.items() if key not in _OF_THE_NODE}
    command = [sys.executable, *module]
    if isinstance(supervisor, Supervisor):
        # It passes signals on, and ends when its step does: it stands for the worker here.
        command = [*step_command(config, on_gpus), *command]
        return supervisor.start(msgspec.structs.replace(spec, command=command, env=env))
    return supervisor.start(msgspec.structs.replace(spec, command=command, env=env), on_gpus)


def _is_job(program: Program, config: Config) -> bool:
    return program.name.startswith("worker-") and uses_slurm(config)


def _spec(program: Program, config: Config) -> ProgramSpec:
    """Its command and environment. UCX settings come from whoever runs the workflow."""
    command = [part.replace("{python}", sys.executable) for part in program.command]
    removal: list[str] = []
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", str(SCRIPTS)), "PYTHONUNBUFFERED": "1"}
    if program.name.startswith("worker-"):
        process = msgspec.json.decode(program.settings, type=WorkerSettings)
        cores = len(os.sched_getaffinity(0))
        gpus = usable_gpus(config.workers.gpus, existing_gpus()) if process.gpus else []
        env |= worker_environment(config, process, gpus, cores)
        env |= {key: value for key, value in os.environ.items() if key.startswith("UCX_")}
        if runs_in_container(config.container, process.role):
            inside = contain_worker(config.container, program.name, process, env)
            command, env, removal = inside.command, inside.env, inside.removal
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


def _write_settings(program: Program) -> None:
    """The file the program reads, and no trace of the one before it."""
    for leftover in ("ready", "sock", "up"):
        (RUN / f"{program.name}.{leftover}").unlink(missing_ok=True)
    text = program.settings
    ensure_named(text + " ".join(program.command), program.host)
    if not program.settings_file:
        return
    if NATS_TOKEN in text:
        text = text.replace(NATS_TOKEN, ensure(NATS_TOKEN_FILE))
    path = Path(program.settings_file)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)


def _wait_ready(
    supervisor: Supervisor | SlurmJobs,
    program: Program,
    info: ProcessInfo,
    log_from: int,
    config: Config,
    report: Report,
) -> None:
    """Raises OperatorError as soon as the process ends, or when `start_s` has passed since it
    began: a job may pend for longer."""
    if isinstance(supervisor, SlurmJobs):
        _wait_allocated(supervisor, program, config, report)
    probe = probe_for(program.name)
    log = LOGS / f"{program.name}.log"
    started = told = time.monotonic()
    while missing := probe(program, info.launch_id):
        now = time.monotonic()
        current = supervisor.state().get(program.name)
        if current is None or not current.running or current.pid != info.pid:
            how = f"exit status {current.exit_status}" if current is not None else "it was stopped"
            said = _new_lines(log, log_from) or ["(nothing)"]
            if paragraph := _own_words(said):
                what, _, remedy = paragraph.partition(f"\n{_REMEDY}")
                raise OperatorError(f"{program.name} could not start: {what}", remedy=remedy)
            lines = "\n".join(f"  | {line}" for line in said[-LAST_LINES:])
            raise OperatorError(
                f"{program.name} ended while it was starting ({how}). Its last words:\n{lines}",
                remedy=f"mend what it complains about; the whole log is {log}",
            )
        if now - started > program.start_s:
            raise OperatorError(
                f"{program.name} was not ready after {program.start_s:g} s: {missing}",
                remedy=f"see {log}; if it only needs longer, raise `deployment.start_s`",
            )
        if now - told >= TELL_EVERY_S:
            told = now
            doing = (_new_lines(log, log_from) or [missing])[-1]
            report(f"{program.name}: {_LINE_HEAD.sub('', doing)[:100]} ({now - started:.0f} s)")
        time.sleep(_PROBE_S if isinstance(supervisor, Supervisor) else _PEND_S / 2)


def _wait_allocated(jobs: SlurmJobs, program: Program, config: Config, report: Report) -> None:
    """Until Slurm has found room for it, saying what it waits for."""
    started, told, last = time.monotonic(), 0.0, ""
    while obstacle := jobs.obstacle(program.name):
        now = time.monotonic()
        if now - started > config.slurm.pending_s:
            raise OperatorError(
                f"{program.name} still pends after {config.slurm.pending_s:g} s ({obstacle})",
                remedy="see `squeue --start`; change what `slurm` asks for, or raise "
                "`slurm.pending_s`",
            )
        if obstacle != last or now - told >= 6 * TELL_EVERY_S:
            report(f"{program.name}: {obstacle} ({now - started:.0f} s)")
            told, last = now, obstacle
        time.sleep(_PEND_S)


def _own_words(lines: list[str]) -> str:
    """The paragraph that a program of ours ended with; empty when it ended otherwise."""
    starts = [place for place, line in enumerate(lines) if _OWN_HEAD.match(line)]
    if not starts:
        return ""
    rest = lines[starts[-1] :]
    end = next((place for place, line in enumerate(rest) if line.startswith(_REMEDY)), 0)
    return _OWN_HEAD.sub("", "\n".join(rest[: end + 1]))


def _new_lines(log: Path, log_from: int) -> list[str]:
    """What was logged since byte `log_from`; everything when the file was rotated since."""
    try:
        with log.open("rb") as file:
            file.seek(log_from if log.stat().st_size >= log_from else 0)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]
