"""What a `Config` means for one run on one machine, and what follows from that alone.

A person writes a `Config`; a run works with a `ResolvedConfig`, in which nothing is `auto` any
more: topology, addresses, credentials, image, device and dtype are known. `deploy/planning/
resolve.py` makes one from the other, in stages. The functions here answer questions about it; they
read only the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from serving.config.deployment import MULTINODE, Topology
from serving.config.parsing import Config
from serving.protocol import Role

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]


class ResolvedConfig(Config, frozen=True):
    """A `Config` with everything filled in, and what was found out about this machine.

    `engine_fingerprint` names the engine to serve: equal configurations on equal machines give
    equal fingerprints. `model_key` names the folder of the downloaded model.
    """

    device: Device
    dtype: Dtype
    engine_fingerprint: str
    model_key: str

    @property
    def topology(self) -> Topology:
        return self.deployment.topology

    @property
    def engine_dir(self) -> str:
        return f"results/engines/{self.engine_fingerprint}"

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.model.name or self.model.id

    def sections(self) -> Config:
        """The sections alone, for other machines."""
        return Config(**{name: getattr(self, name) for name in Config.__struct_fields__})


def resolved_config(
    config: Config, *, device: Device, dtype: Dtype, engine_fingerprint: str, model_key: str
) -> ResolvedConfig:
    """`config` with the results of the last stage beside it."""
    sections = {name: getattr(config, name) for name in Config.__struct_fields__}
    return ResolvedConfig(
        **sections,
        device=device,
        dtype=dtype,
        engine_fingerprint=engine_fingerprint,
        model_key=model_key,
    )


def read_resolved(plain: Mapping[str, Any]) -> ResolvedConfig:
    """From the plain data that `as_plain` made. Raises msgspec.ValidationError."""
    return msgspec.convert(plain, ResolvedConfig)


def with_topology(config: Config, topology: Topology) -> Config:
    """`config` for `topology`. The `*_router` topologies and multi-node ones always route by KV."""
    deployment = msgspec.structs.replace(config.deployment, topology=topology)
    by_kv = topology.endswith("_router") or topology == MULTINODE
    router = msgspec.structs.replace(config.router, policy="kv") if by_kv else config.router
    return msgspec.structs.replace(config, deployment=deployment, router=router)


def topology_roles(topology: Topology) -> tuple[Role, ...]:
    """The roles that a request needs."""
    return ("prefill", "decode") if topology.startswith("disagg") else ("agg",)


def is_joining_node(config: Config) -> bool:
    """Whether this machine works for the head of another."""
    return config.deployment.topology == MULTINODE and config.cluster.head is not None


def uses_slurm(config: Config) -> bool:
    """Whether workers are Slurm jobs."""
    is_head = config.deployment.topology == MULTINODE and not is_joining_node(config)
    return is_head and config.cluster.launcher == "slurm"


def worker_counts(config: Config) -> dict[Role, int]:
    """How many workers of each role this machine starts."""
    topology, cluster = config.deployment.topology, config.cluster
    roles: Sequence[Role] = topology_roles(topology)
    if topology == MULTINODE and not uses_slurm(config):
        on_head = sorted(set(cluster.head_roles), reverse=True)
        roles = [cluster.role] if is_joining_node(config) else on_head
    return {role: getattr(config.workers, role) for role in roles}


def gpus_per_worker(config: Config) -> dict[Role, int]:
    """How many GPUs a worker of each role computes on."""
    tensor, pipeline = config.workers.tensor_parallel, config.workers.pipeline_parallel
    return {role: tensor.get(role, 1) * pipeline.get(role, 1) for role in worker_counts(config)}
