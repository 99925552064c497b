"""Config and topology to the programs of a deployment. Pure: nothing is started or written.

A program's `fingerprint` covers what it was told and the code it runs. What may change under a
running program (deadlines of the start, thread counts left to `auto`) is not part of it, so that
one more worker restarts nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Config, Topology, is_loopback
from serving.config.process import ControlServices, FrontendSettings, WorkerSettings
from serving.deploy.containers.run_command import container_identity
from serving.deploy.planning.placement import place, require_room, visible_order
from serving.deploy.processes.credentials import (
    AUTHORITY_FILE,
    ETCD_SERVER_FILE,
    JOIN_FILE,
    NATS_TOKEN_FILE,
    RPC_SECRET_FILE,
    api_keys_file,
    with_certificate,
)
from serving.errors import ConfigError
from serving.gpus import Links
from serving.protocol import Role

MULTINODE: Topology = "disagg_multinode"
NATS_TOKEN = "@TOKEN@"
"""Stands for the token in `nats.conf` until the file is written: plans hold no secrets."""
FRONTEND_GRACE_S = 5.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class Program(Struct, frozen=True, kw_only=True):
    """One process to run. `settings` is the text of the file it reads, `settings_file` its path.

    `{python}` in `command` means the interpreter of whoever starts it. `ports` maps config keys to
    TCP ports it will listen on, at `host`. `engine` is the engine it serves, empty for etcd and NATS.
    """

    name: str
    command: list[str]
    fingerprint: str
    host: str
    ports: dict[str, int]
    settings: str
    settings_file: str
    engine: str
    start_s: float
    stop_s: float


class DeploymentPlan(Struct, frozen=True, kw_only=True):
    """What should run, in the order to start it; it is stopped in the reverse order."""

    topology: Topology
    engine_fingerprint: str
    engine_dir: str
    programs: list[Program]

    def __getitem__(self, name: str) -> Program:
        for program in self.programs:
            if program.name == name:
                return program
        raise ConfigError(
            "",
            f"{name} is no program of the topology {self.topology}",
            remedy="request a serve_* target; `workers.*` says how many workers there are",
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        return {program.name: program.fingerprint for program in self.programs}

    @property
    def workers(self) -> list[str]:
        return [p.name for p in self.programs if p.name.startswith("worker-")]


def roles(topology: Topology) -> tuple[Role, ...]:
    return ("prefill", "decode") if topology.startswith("disagg") else ("agg",)


def joins(config: Config) -> bool:
    """Whether this machine works for the head of another."""
    return config.deployment.topology == MULTINODE and config.cluster.head is not None


def uses_slurm(config: Config) -> bool:
    """Whether workers are jobs."""
    head = config.deployment.topology == MULTINODE and not joins(config)
    return head and config.cluster.launcher == "slurm"


def workers_here(config: Config) -> dict[Role, int]:
    """How many workers of each role this machine starts."""
    topology, cluster = config.deployment.topology, config.cluster
    here: Sequence[Role] = roles(topology)
    if topology == MULTINODE and not uses_slurm(config):
        here = [cluster.role] if joins(config) else sorted(set(cluster.head_roles), reverse=True)
    return {role: getattr(config.workers, role) for role in here}


def gpus_per_worker(config: Config) -> dict[Role, int]:
    """How many GPUs a worker of each role computes on."""
    tensor, pipeline = config.workers.tensor_parallel, config.workers.pipeline_parallel
    return {role: tensor.get(role, 1) * pipeline.get(role, 1) for role in workers_here(config)}


def placed(
    config: Config, gpus: Sequence[int], links: Links = frozenset()
) -> dict[tuple[Role, int], list[int]]:
    """The GPUs of each worker by role and index. Raises ConfigError when they do not suffice."""
    sizes, counts = gpus_per_worker(config), workers_here(config)
    engine = config.engine
    may_share = engine.backend == "torch" or engine.kv_cache_tokens is not None
    require_room(counts, sizes, gpus, may_share=may_share)
    return {
        (role, index): place(role, index, gpus, sizes, links)
        for role, count in counts.items()
        for index in range(count)
    }


def pinned(config: Config, topology: Topology) -> Config:
    """The config as `topology` means it: the `*_router` topologies always route by KV, off loopback
    there are API keys, and HTTPS has a certificate."""
    deployment = msgspec.structs.replace(config.deployment, topology=topology)
    by_kv = topology.endswith("_router") or topology == MULTINODE
    policy = "kv" if by_kv else config.router.policy
    router = msgspec.structs.replace(config.router, policy=policy)
    keys = api_keys_file(config.frontend)
    frontend = with_certificate(msgspec.structs.replace(config.frontend, api_keys_file=keys))
    return msgspec.structs.replace(config, deployment=deployment, router=router, frontend=frontend)


def plan(
    config: Config,
    *,
    engine_fingerprint: str,
    device: str,
    dtype: str,
    gpus: Sequence[int],
    code: Mapping[str, str],
    links: Links = frozenset(),
) -> DeploymentPlan:
    """The programs of `config.deployment.topology`.

    `gpus` are those to hand out, unused when `device` is `cpu`; `links` says which of them NVLink
    joins. `code` has the digest of the sources of `worker` and `frontend`. Raises ConfigError
    when there are too few GPUs.
    """
    topology = config.deployment.topology
    engine_dir = f"results/engines/{engine_fingerprint}"
    control = ControlServices(
        namespace=config.deployment.namespace,
        etcd_endpoint=address(config.etcd.host, config.etcd.port),
        lease_s=config.etcd.lease_s,
        nats_url=f"nats://{address(config.nats.host, config.nats.port)}",
        nats_token_file=NATS_TOKEN_FILE,
        rpc_secret_file=RPC_SECRET_FILE,
        etcd_join_file="" if is_loopback(config.etcd.host) else JOIN_FILE,
    )
    name = config.model.name or config.model.id
    slurm = uses_slurm(config)
    places = placed(config, gpus, links) if device == "cuda" and not slurm else {}
    programs = [] if joins(config) else [_etcd(config), _nats(config)]
    # Jobs move from node to node, and are the head's wherever they are.
    node = f"{config.cluster.node}-" if topology == MULTINODE and not slurm else ""
    for role, count in workers_here(config).items():
        for index in range(count):
            instance = f"{role}-{node}{index}"
            worker = WorkerSettings(
                instance_id=instance,
                role=role,
                model_name=name,
                engine_dir=engine_dir,
                engine_fingerprint=engine_fingerprint,
                engine=config.engine,
                device=device,
                dtype=dtype,
                gpus=places.get((role, index), []),
                host="" if slurm else config.network.rpc_host,  # known on the node only
                kv_host="" if slurm else config.network.kv_host,
                unix_socket=f"run/worker-{instance}.sock",
                ready_file=f"run/worker-{instance}.ready",
                control=control,
                kv_transfer=config.kv_transfer,
                # It should be done draining before it is killed.
                drain_s=0.75 * config.deployment.stop_s,
                mock=config.mock if config.engine.backend == "mock" else None,
                num_instances=config.workers.instances_per_process,
            )
            programs.append(
                _python(
                    f"worker-{instance}",
                    "worker",
                    worker,
                    config,
                    engine=engine_fingerprint,
                    code=code["worker"],
                    host=worker.host,
                    ports={},
                    stop_s=config.deployment.stop_s,
                    container=container_identity(config.container, role),
                )
            )
    if joins(config):
        return DeploymentPlan(
            topology=topology,
            engine_fingerprint=engine_fingerprint,
            engine_dir=engine_dir,
            programs=programs,
        )
    frontend = FrontendSettings(
        topology=topology,
        disaggregated="prefill" in roles(topology),
        model_name=name,
        engine_dir=engine_dir,
        frontend=config.frontend,
        router=config.router,
        deadlines=config.deadlines,
        control=control,
        ready_file="run/frontend.ready",
        own_instances=[
            program.name.removeprefix("worker-")
            for program in programs
            if program.name.startswith("worker-")
        ]
        if topology == MULTINODE
        else None,
    )
    programs.append(
        _python(
            "frontend",
            "frontend",
            frontend,
            config,
            engine=engine_fingerprint,
            code=code["frontend"],
            host=config.frontend.host,
            ports={"frontend.port": config.frontend.port},
            stop_s=config.frontend.drain_s + FRONTEND_GRACE_S,
        )
    )
    return DeploymentPlan(
        topology=topology,
        engine_fingerprint=engine_fingerprint,
        engine_dir=engine_dir,
        programs=programs,
    )


def stop_tiers(names: Sequence[str]) -> list[list[str]]:
    """What to stop together, in order: those who take requests first, those they lean on last."""
    order = {"frontend": 0, "worker": 1, "nats": 2, "etcd": 3}
    tiers: dict[int, list[str]] = {}
    for name in names:
        tiers.setdefault(order.get(name.split("-")[0], 1), []).append(name)
    return [tiers[tier] for tier in sorted(tiers)]


def address(host: str, port: int) -> str:
    """`host:port` to connect to; a wildcard address is reached over loopback."""
    host = _ANY.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def worker_environment(
    config: Config, worker: WorkerSettings, gpus: Sequence[int], num_cores: int
) -> dict[str, str]:
    """What a worker finds in its environment; not part of its fingerprint."""
    share = max(1, num_cores // max(1, sum(workers_here(config).values())))
    threads = str(config.engine.num_threads or share)
    environment = {
        "OMP_NUM_THREADS": threads,
        # Spinning threads would take the cores from the other workers.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in a library leaves a trace in the log
        "CUDA_VISIBLE_DEVICES": "",
    }
    if worker.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = visible_order(worker.gpus, gpus)
    else:
        environment["UCX_RNDV_FRAG_MEM_TYPE"] = "host"
    return environment


def _python(
    name: str,
    module: str,
    process: WorkerSettings | FrontendSettings,
    config: Config,
    *,
    engine: str,
    code: str,
    host: str,
    ports: dict[str, int],
    stop_s: float,
    container: Sequence[Any] = (),
) -> Program:
    settings_file = f"run/{name}.json"
    command = ["{python}", "-m", f"serving.{module}", settings_file]
    settings = msgspec.json.format(msgspec.json.encode(process), indent=2).decode() + "\n"
    return Program(
        name=name,
        command=command,
        fingerprint=_digest([command, settings, engine, code, *container]),
        host=host,
        ports=ports,
        settings=settings,
        settings_file=settings_file,
        engine=engine,
        start_s=config.deployment.start_s,
        stop_s=stop_s,
    )


def _plane(
    name: str, command: list[str], settings: str, host: str, ports: dict[str, int], config: Config
) -> Program:
    return Program(
        name=name,
        command=command,
        fingerprint=_digest([command, settings]),
        host=host,
        ports=ports,
        settings=settings,
        settings_file=f"run/{name}.conf" if settings else "",
        engine="",
        start_s=config.deployment.start_s,
        stop_s=config.deployment.stop_s,
    )


def _etcd(config: Config) -> Program:
    etcd = config.etcd
    plain = is_loopback(etcd.host)
    scheme = "http" if plain else "https"
    # It is alone: what would be its peers' port stays where nobody else gets to it.
    peers = f"http://127.0.0.1:{etcd.peer_port}"
    trust = [
        f"--cert-file={ETCD_SERVER_FILE}",
        f"--key-file={ETCD_SERVER_FILE}",
        f"--trusted-ca-file={AUTHORITY_FILE}",
        "--client-cert-auth",
    ]
    command = [
        "results/bin/etcd",
        "--name=serving",
        "--data-dir=run/etcd",
        f"--listen-client-urls={scheme}://{_bracketed(etcd.host)}:{etcd.port}",
        f"--advertise-client-urls={scheme}://{address(etcd.host, etcd.port)}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=serving={peers}",
        *([] if plain else trust),
        # Every lease renewal and every load of membership leaves revisions behind.
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-level=warn",
    ]
    ports = {"etcd.port": etcd.port, **({"etcd.peer_port": etcd.peer_port} if plain else {})}
    return _plane("etcd", command, "", etcd.host, ports, config)


def _nats(config: Config) -> Program:
    settings = (
        "server_name: serving\n"
        f"listen: {json.dumps(f'{_bracketed(config.nats.host)}:{config.nats.port}')}\n"
        f'authorization {{ token: "{NATS_TOKEN}" }}\n'
    )
    command = ["results/bin/nats-server", "--config", "run/nats.conf"]
    ports = {"nats.port": config.nats.port}
    return _plane("nats", command, settings, config.nats.host, ports, config)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
