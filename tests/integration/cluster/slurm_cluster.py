"""A real Slurm on this machine: munge, slurmctld and two slurmd nodes, for the time of a test.

Its configuration lies where Debian's programs look for it, so a machine that is configured already
is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from missing_tools import SLURM, skip_without
from waiting import wait_until

CONF = Path("/etc/slurm/slurm.conf")
COMMAND_S = 20
NODES = ("n1", "n2")


def run(*command: str, check: bool = True) -> str:
    """Every Slurm command has a hard limit: what hangs must not hang the tests."""
    done = subprocess.run(
        ["timeout", "--kill-after=2", str(COMMAND_S), *command],
        capture_output=True,
        text=True,
        timeout=COMMAND_S + 5,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def require_slurm() -> None:
    skip_without(SLURM, _PATH)
    if os.geteuid() != 0:
        pytest.skip("a Slurm of its own needs root")
    if CONF.exists():
        pytest.skip(f"this machine belongs to a Slurm already: {CONF}")


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def configuration(folder: Path) -> str:
    host = socket.gethostname()
    ports = dict(zip(NODES, (16818, 16819), strict=True))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
        for name, port in ports.items()
    )
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MpiDefault=none
JobRequeue=1
KillWait=5
ReturnToService=2
SwitchType=switch/none
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Two nodes of two cores each, idle. Everything is gone afterwards, jobs included."""
    require_slurm()
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    CONF.parent.mkdir(exist_ok=True)
    CONF.write_text(configuration(folder))
    started: list[subprocess.Popen[bytes]] = []
    munge_run = Path("/run/munge")
    try:
        if not run("munge", "-n", check=False):
            munge_run.mkdir(exist_ok=True)
            shutil.chown(munge_run, "munge", "munge")
            started.append(
                _start(folder, "runuser", "-u", "munge", "--", "munged", "-F", "--force")
            )
            wait_until(lambda: run("munge", "-n", check=False) != "", what="munge answers")
        started.append(_start(folder, "slurmctld", "-D"))
        for node in NODES:
            started.append(_start(folder, "slurmd", "-D", "-N", node))
        wait_until(
            lambda: run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * 2,
            60,
            "both nodes are idle",
        )
        yield
    finally:
        if CONF.exists():
            run("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not queue(), 30, "no job is left")
        for process in reversed(started):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.wait(10)
        CONF.unlink(missing_ok=True)


def queue() -> list[str]:
    """A line for each job that is pending, running or ending: `ID NAME STATE NODE`."""
    return run("squeue", "-h", "-o", "%i %j %T %N").splitlines()


def _start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PATH": _PATH}
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
