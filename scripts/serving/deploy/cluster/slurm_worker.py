"""`python -m serving.deploy.cluster.slurm_worker FILE HEAD [NETWORK]`: a worker on a Slurm node.

This process finds out what the head could not know: the address of this node (in NETWORK, or on the
way to HEAD), and the GPUs and cores of the job. Then it becomes the worker, without the variables
that would make libraries believe that they are a task of a parallel job.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from serving.config.process import WorkerSettings, read_settings
from serving.deploy.cluster.network import listen_address
from serving.host_cpus import host_cpus

_JOB_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMI2_", "PMIX_")


def settings_on_this_node(
    process: WorkerSettings, address: str, environ: Mapping[str, str]
) -> WorkerSettings:
    """`process` with the address and the GPUs of this node."""
    gpus = [entry for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return msgspec.structs.replace(
        process,
        host=address,
        kv_host=address,
        # In a job, the driver numbers its GPUs from 0.
        gpus=list(range(len(gpus))) if process.device == "cuda" else [],
    )


def without_job_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process that is not a task of a job, with as many threads as the job has cores."""
    cores = environ.get("SLURM_CPUS_PER_TASK") or str(host_cpus())
    kept = {k: v for k, v in environ.items() if not k.startswith(_JOB_VARIABLES)}
    kept.setdefault("OMP_NUM_THREADS", cores)
    return kept


def address_towards(head: str) -> str:
    """The address of this node on the network that leads to `head`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # sends nothing
        return str(probe.getsockname()[0])


def main() -> None:
    file, head, *network = sys.argv[1:]
    process = read_settings(file, WorkerSettings)
    address = listen_address(network[0], "slurm.network") if network else address_towards(head)
    settings = Path(file).with_suffix(".node")
    Path(process.ready_file).unlink(missing_ok=True)
    settings.write_bytes(msgspec.json.encode(settings_on_this_node(process, address, os.environ)))
    command = [sys.executable, "-m", "serving.worker", str(settings)]
    os.execve(sys.executable, command, without_job_variables(os.environ))


if __name__ == "__main__":
    main()
