"""Stop programs that no longer belong to the deployment, or all of it.

Requests drain before anything stops that they need.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence

from serving.config import Config
from serving.config.resolve import is_joining_node
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.healing.kept_programs import remove_traces
from serving.deploy.healing.watcher_program import ensure_watcher
from serving.deploy.planning.program import stop_tiers
from serving.deploy.processes import ports
from serving.deploy.processes.launchers import RUN, WATCHER
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes
from serving.deploy.processes.topology_record import (
    TopologyRecord,
    obsolete_programs,
    remove_record,
    write_record,
)
from serving.errors import ConfigError, OperatorError
from serving.progress import Report
from serving.restarts import forget_restarts

_LEFTOVERS = (
    "*.up",
    "*.open",
    "*.engine",
    "*.node",
    "*.ready",
    "*.sock",
    "*.json",
    "*.conf",
    "*.pid",
    "*.tmp",
    "*.lock",
    "responses.sqlite*",
)
_FOLDERS = ("programs", "etcd", "etcd.damaged", "slurm", "restarts")
"""Secrets stay, since clients have the API keys, and other nodes have the join file."""


def stop_obsolete(wanted: TopologyRecord, report: Report) -> None:
    """Stop the programs that `wanted` does not have, and record `wanted` as deployed."""
    supervisor = Supervisor()
    supervisor.ensure()
    running = {**supervisor.state(), **SlurmJobs().state()}
    _stop(supervisor, obsolete_programs(wanted, running), report)
    write_record(wanted, RUN)
    ensure_watcher(supervisor)


def stop_all(config: Config, report: Report) -> None:
    """Stop the deployment in this directory, whatever state it is in.

    Raises OperatorError when a process survives. Ports that are still taken are reported.
    """
    supervisor = Supervisor()
    names = [*supervisor.state(), *SlurmJobs().state()]
    strays = sorted({tag.program for _, tag in supervisor.orphans()} - {"", WATCHER})
    supervisor.stop([WATCHER])
    _stop(supervisor, names, report)
    if strays:
        report(f"stopping {', '.join(strays)}, which run without their supervisor")
    supervisor.shutdown()
    left = [f"pid {process.pid} ({tag.program})" for process, tag in deployed_processes(RUN)]
    if left:
        raise OperatorError(
            f"still running: {', '.join(left)}",
            remedy="end them with `kill -9`; if they stay, see `dmesg`",
        )
    _tidy()
    _check_ports(config, report)
    report("stopped; nothing is left" if names or strays else "nothing runs here")


def _stop(supervisor: Supervisor, names: Sequence[str], report: Report) -> None:
    for tier in stop_tiers(names):
        report(f"stopping {', '.join(tier)}")
        supervisor.stop(tier)
        SlurmJobs().stop(tier)
        for name in tier:
            remove_traces(name)
            (RUN / f"{name}.json").unlink(missing_ok=True)
            forget_restarts(name)


def _tidy() -> None:
    """Remove the files of the deployment by name: the folder may have others, too."""
    remove_record(RUN)
    for pattern in _LEFTOVERS:
        for path in RUN.glob(pattern):
            path.unlink(missing_ok=True)
    for folder in _FOLDERS:
        shutil.rmtree(RUN / folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        RUN.rmdir()


def _check_ports(config: Config, report: Report) -> None:
    """Report ports that another process has taken by now, since the next start needs them."""
    if is_joining_node(config):
        return
    etcd_ports = {"etcd.port": config.etcd.port, "etcd.peer_port": config.etcd.peer_port}
    wanted = (
        (config.frontend.host, {"frontend.port": config.frontend.port}),
        (config.nats.host, {"nats.port": config.nats.port}),
        (config.etcd.host, etcd_ports),
    )
    for host, held in wanted:
        try:
            ports.require_ports(host, held, RUN)
        except ConfigError:
            continue  # the config has changed; the next start reports it
        except OperatorError as exc:
            report(f"note: {exc.what}")
