"""`python -m serving.deploy.cluster.slurm_worker FILE HEAD [NETWORK]`: one worker, on whatever node Slurm chose.

What the head could not know is found out here: the address that others reach this node at (in
NETWORK, or from where it reaches HEAD), the GPUs and the cores it was given. Then this process
becomes the worker, without the variables that would make its libraries believe that they are a
task of a parallel job.
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

_OF_THE_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMI2_", "PMIX_")


def placed(process: WorkerSettings, address: str, environ: Mapping[str, str]) -> WorkerSettings:
    """`process` as it is on this node."""
    gpus = [entry for entry in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    return msgspec.structs.replace(
        process,
        host=address,
        kv_host=address,
        # Those that this job sees: the driver numbers them from 0.
        gpus=list(range(len(gpus))) if process.device == "cuda" else [],
    )


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a process that is no task of a job, with the threads that this one was given."""
    cores = environ.get("SLURM_CPUS_PER_TASK") or str(len(os.sched_getaffinity(0)))
    kept = {k: v for k, v in environ.items() if not k.startswith(_OF_THE_JOB)}
    kept.setdefault("OMP_NUM_THREADS", cores)
    return kept


def reached_from(head: str) -> str:
    """This node's address on the way to `head`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # sends nothing
        return str(probe.getsockname()[0])


def main() -> None:
    file, head, *network = sys.argv[1:]
    process = read_settings(file, WorkerSettings)
    address = listen_address(network[0], "slurm.network") if network else reached_from(head)
    settings = Path(file).with_suffix(".node")
    Path(process.ready_file).unlink(missing_ok=True)
    settings.write_bytes(msgspec.json.encode(placed(process, address, os.environ)))
    command = [sys.executable, "-m", "serving.worker", str(settings)]
    os.execve(sys.executable, command, scrubbed(os.environ))


if __name__ == "__main__":
    main()
