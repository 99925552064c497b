"""Slurm's command lines: the batch script of a worker, the step of an allocation, and queries.

Every command has a deadline, since a Slurm without its controller lets commands hang.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from serving.config import Config
from serving.deploy.processes.launchers import LOGS, ProgramSpec
from serving.errors import OperatorError

COMMAND_S = 30.0
_SUBMITTER = "PATH,HOME,USER,LANG,LD_LIBRARY_PATH"
"""The variables that a job takes from the environment of its submitter."""
_FIELD = re.compile(r"(\w+)=(\S*)")


def batch_script(spec: ProgramSpec, config: Config) -> str:
    """The standard input of `sbatch` for one worker."""
    slurm = config.slurm
    parallel = slurm.mpi != "none" and spec.num_gpus > 1
    options = {
        "job-name": f"{config.deployment.namespace}-{spec.name.removeprefix('worker-')}",
        "output": str((LOGS / f"{spec.name}.log").absolute()),
        "open-mode": "append",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time_limit,
        "nodelist": slurm.nodelist,
        "mem": slurm.memory,
        "cpus-per-task": slurm.cpus_per_task,
        "gres": _gres(config, spec.num_gpus),
        "export": _SUBMITTER,
        "nodes": 1,
        "ntasks": spec.num_gpus if parallel else 1,
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {flag}" for flag in slurm.extra_flags)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.env.items())]
    launcher = ["srun", f"--mpi={slurm.mpi}", "trtllm-llmapi-launch"] if parallel else []
    return "\n".join([*lines, f"exec {shlex.join([*launcher, *spec.command])}", ""])


def step_command(config: Config, num_gpus: int) -> list[str]:
    """The command that runs a worker as a step of the allocation of this process."""
    slurm = config.slurm
    options = {
        "nodes": 1,
        "ntasks": 1,
        "nodelist": slurm.nodelist,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        "gres": _gres(config, num_gpus),
    }
    chosen = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # Exactly what it needs, so that steps run side by side. A step without room fails at once.
    return ["srun", "--exact", "--immediate=60", *chosen]


def inside_allocation() -> bool:
    """Whether this process runs in an allocation, whose steps workers can be."""
    return "SLURM_JOB_ID" in os.environ


def show_job(job_id: int, command_s: float = COMMAND_S) -> dict[str, str]:
    """The fields of `scontrol show job`; empty for a job that Slurm has forgotten.

    Raises OperatorError when Slurm does not answer.
    """
    done = run_slurm(["scontrol", "--oneliner", "show", "job", str(job_id)], command_s=command_s)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return {}
        raise OperatorError(
            f"Slurm does not answer: {done.stderr.strip()}",
            remedy="check with `sinfo` that slurmctld is up",
        )
    return dict(_FIELD.findall(done.stdout))


def run_slurm(
    command: list[str], standard_input: str = "", *, command_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Raises OperatorError when the command does not return within `command_s`."""
    try:
        return subprocess.run(
            command,
            input=standard_input,
            capture_output=True,
            text=True,
            timeout=command_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise OperatorError(
            f"`{shlex.join(command)}` did not return within {command_s:g} s",
            remedy="check with `sinfo` that slurmctld is up",
        ) from None


def _gres(config: Config, num_gpus: int) -> str | None:
    return config.slurm.gres or (f"gpu:{num_gpus}" if num_gpus else None)
