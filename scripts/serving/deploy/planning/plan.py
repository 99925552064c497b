"""From a resolved configuration to the programs of the deployment. Pure: starts and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from serving.config import MULTINODE, Config, ResolvedConfig
from serving.config.process import ControlServices, FrontendSettings, WorkerSettings
from serving.config.resolve import is_joining_node, topology_roles, uses_slurm, worker_counts
from serving.deploy.containers.run_command import container_identity
from serving.deploy.planning.control_services import control_services, etcd_program, nats_program
from serving.deploy.planning.gpu_assignment import assign_gpus, visible_order
from serving.deploy.planning.program import DeploymentPlan, Program, program_fingerprint
from serving.gpus import Links
from serving.protocol import Role

FRONTEND_GRACE_S = 5.0


def plan_deployment(
    config: ResolvedConfig,
    *,
    gpus: Sequence[int],
    code: Mapping[str, str],
    nvlinks: Links = frozenset(),
) -> DeploymentPlan:
    """The programs that this machine runs for `config.topology`.

    `gpus` are the indices to hand out, unused on CPU; `nvlinks` are the pairs of them that NVLink
    joins. `code` has the digest of the sources of `worker` and `frontend`. Raises ConfigError
    when there are too few GPUs.
    """
    on_gpus = config.device == "cuda" and not uses_slurm(config)
    own_gpus = assign_gpus(config, gpus, nvlinks) if on_gpus else {}
    control = control_services(config)
    workers = [
        _worker_program(config, role, index, own_gpus.get((role, index), []), control, code)
        for role, count in worker_counts(config).items()
        for index in range(count)
    ]
    programs = workers
    if not is_joining_node(config):
        frontend = _frontend_program(config, workers, control, code)
        programs = [etcd_program(config), nats_program(config), *workers, frontend]
    return DeploymentPlan(
        topology=config.topology,
        engine_fingerprint=config.engine_fingerprint,
        engine_dir=config.engine_dir,
        programs=programs,
    )


def _worker_program(
    config: ResolvedConfig,
    role: Role,
    index: int,
    gpus: list[int],
    control: ControlServices,
    code: Mapping[str, str],
) -> Program:
    slurm = uses_slurm(config)
    # A Slurm job may run on any node, and belongs to the head on all of them.
    node = f"{config.cluster.node}-" if config.topology == MULTINODE and not slurm else ""
    instance = f"{role}-{node}{index}"
    settings = WorkerSettings(
        instance_id=instance,
        role=role,
        model_name=config.model_name,
        engine_dir=config.engine_dir,
        engine_fingerprint=config.engine_fingerprint,
        engine=config.engine,
        device=config.device,
        dtype=config.dtype,
        gpus=gpus,
        host="" if slurm else config.network.rpc_host,  # a job learns it on its node
        kv_host="" if slurm else config.network.kv_host,
        unix_socket=f"run/worker-{instance}.sock",
        ready_file=f"run/worker-{instance}.ready",
        control=control,
        kv_transfer=config.kv_transfer,
        # It should finish draining before it is killed.
        drain_s=0.75 * config.deployment.stop_s,
        hang_s=config.deployment.hang_s,
        mock=config.mock if config.engine.backend == "mock" else None,
        num_instances=config.workers.instances_per_process,
    )
    return _python_program(
        f"worker-{instance}",
        "worker",
        settings,
        config,
        code=code["worker"],
        host=settings.host,
        ports={},
        stop_s=config.deployment.stop_s,
        container=container_identity(config.container, role),
    )


def _frontend_program(
    config: ResolvedConfig,
    workers: Sequence[Program],
    control: ControlServices,
    code: Mapping[str, str],
) -> Program:
    own_instances = [worker.name.removeprefix("worker-") for worker in workers]
    settings = FrontendSettings(
        topology=config.topology,
        disaggregated="prefill" in topology_roles(config.topology),
        model_name=config.model_name,
        aliases=config.model.aliases,
        engine_dir=config.engine_dir,
        frontend=config.frontend,
        router=config.router,
        deadlines=config.deadlines,
        control=control,
        ready_file="run/frontend.ready",
        own_instances=own_instances if config.topology == MULTINODE else None,
        silent_s=config.deployment.silent_s,
    )
    return _python_program(
        "frontend",
        "frontend",
        settings,
        config,
        code=code["frontend"],
        host=config.frontend.host,
        ports={"frontend.port": config.frontend.port},
        stop_s=config.frontend.drain_s + FRONTEND_GRACE_S,
    )


def _python_program(
    name: str,
    module: str,
    settings: WorkerSettings | FrontendSettings,
    config: ResolvedConfig,
    *,
    code: str,
    host: str,
    ports: dict[str, int],
    stop_s: float,
    container: Sequence[Any] = (),
) -> Program:
    settings_file = f"run/{name}.json"
    command = ["{python}", "-m", f"serving.{module}", settings_file]
    text = msgspec.json.format(msgspec.json.encode(settings), indent=2).decode() + "\n"
    engine = config.engine_fingerprint
    return Program(
        name=name,
        command=command,
        fingerprint=program_fingerprint([command, text, engine, code, *container]),
        host=host,
        ports=ports,
        settings=text,
        settings_file=settings_file,
        engine=engine,
        start_s=config.deployment.start_s,
        stop_s=stop_s,
    )


def worker_environment(
    config: Config, worker: WorkerSettings, gpus: Sequence[int], num_cores: int
) -> dict[str, str]:
    """The environment of a worker; not part of its fingerprint. `gpus` are all indices handed out."""
    num_workers = max(1, sum(worker_counts(config).values()))
    share = max(1, num_cores // num_workers)
    threads = str(config.engine.num_threads or share)
    environment = {
        "OMP_NUM_THREADS": threads,
        "SERVING_LOCAL_WORKERS": str(num_workers),  # they share the memory
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
