"""The sections about addresses and several machines: `network`, `cluster` and `slurm`."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from msgspec import Meta

from serving.config.base import Positive, Seconds, Section

_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class NetworkConfig(Section, frozen=True):
    """Where workers listen. They advertise the same addresses."""

    rpc_host: Annotated[
        str,
        Meta(
            description="For frontends: an address, a network (`10.1.0.0/16`) or an interface (`eth0`)."
        ),
    ] = "127.0.0.1"
    kv_host: Annotated[
        str,
        Meta(
            description="For workers that fetch KV: an address, a network or an interface. Without InfiniBand, UCX uses this interface alone unless `UCX_NET_DEVICES` is set."
        ),
    ] = "127.0.0.1"


class ClusterConfig(Section, frozen=True):
    """Several machines: `serve_disagg_multinode` on the head, `join` on the other nodes."""

    address: Annotated[
        str | None,
        Meta(
            description="Where other nodes reach this one: an address, a network (`10.1.0.0/16`) or an interface (`eth0`). `etcd`, `nats` and `network` use it unless they set another. Default: on the head `HEAD_NODE_IP` from the environment; on a node that joins, the address from which it reaches the head."
        ),
    ] = None
    head: Annotated[
        str | None,
        Meta(
            description="For `join`: the head's address, with `:PORT` where the head uses another port than `etcd.port`. Default: `HEAD_NODE_IP` or `ETCD_ENDPOINTS` from the environment."
        ),
    ] = None
    role: Annotated[
        Literal["prefill", "decode"],
        Meta(description="For `join`: role of this node's workers. `workers` sets their number."),
    ] = "prefill"
    head_roles: Annotated[
        tuple[Literal["prefill", "decode"], ...],
        Meta(description="Roles of the workers that run on the head itself."),
    ] = ("decode",)
    launcher: Annotated[
        Literal["local", "slurm"],
        Meta(
            description="How `serve_disagg_multinode` starts workers. `local`: the head starts those of `head_roles` itself. `slurm`: all workers are Slurm jobs, see `slurm`."
        ),
    ] = "local"
    node: Annotated[
        Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)] | None,
        Meta(description="This node's part of its workers' names. Default: from its address."),
    ] = None
    join_file: Annotated[
        str,
        Meta(
            description="For `join`: a copy of the head's `run/secrets/join.pem`. Everyone who has it can join."
        ),
    ] = "join.pem"


class SlurmConfig(Section, frozen=True):
    """Workers as Slurm jobs (`cluster.launcher: slurm`), in a folder that all nodes can see."""

    partition: Annotated[str | None, Meta(description="Partition. Default: Slurm's.")] = None
    account: Annotated[str | None, Meta(description="Account to charge.")] = None
    qos: Annotated[str | None, Meta(description="Quality of service.")] = None
    time_limit: Annotated[
        str | None, Meta(description="In the format of `--time`. Default: the partition's.")
    ] = None
    nodelist: Annotated[str | None, Meta(description="Nodes to choose from.")] = None
    cpus_per_task: Annotated[
        Positive | None, Meta(description="Cores of each worker. Default: Slurm's, usually 1.")
    ] = None
    memory: Annotated[str | None, Meta(description="Memory of each worker, such as `32G`.")] = None
    gres: Annotated[
        str | None,
        Meta(
            description="Devices of each worker. Default: `gpu:N` with the number of its GPUs; none on CPU."
        ),
    ] = None
    network: Annotated[
        str | None,
        Meta(
            description="Network or interface of the workers' addresses. Default: the one from which a node reaches the head."
        ),
    ] = None
    mpi: Annotated[
        Literal["none", "pmix", "pmi2"],
        Meta(
            description="Start TensorRT-LLM workers of several GPUs with `srun --mpi`, one task for each GPU."
        ),
    ] = "none"
    pending_s: Annotated[
        Seconds, Meta(description="How long a job may pend before the start fails.")
    ] = 3600.0
    extra_flags: Annotated[
        list[str], Meta(description="Additional options of `sbatch`, such as `--constraint=h100`.")
    ] = []


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a listener on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connect_address(host: str, port: int) -> str:
    """`host:port` to connect to. A listener on a wildcard address is reached over loopback."""
    host = _LOOPBACK_OF.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
