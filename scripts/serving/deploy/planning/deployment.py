"""What the Snakefile needs to know before it can say what must exist.

Called while the Snakefile is parsed, so it imports nothing heavy. Before a run that serves, it
also removes markers that stopped being true and makes sure that the ports can be had; any other
run, a dry run above all, leaves the disk as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Config, EtcdConfig, Topology, as_plain, parse
from serving.deploy.cluster.network import listening
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.containers.image_recipes import with_built_image
from serving.deploy.planning.fingerprint import (
    engine_fingerprint,
    model_key,
    resolve_device,
    resolve_dtype,
)
from serving.deploy.planning.placement import existing_gpus, usable_gpus
from serving.deploy.planning.request import Request, from_command_line
from serving.deploy.planning.source_digest import SCRIPTS, source_digest
from serving.deploy.planning.topology import (
    MULTINODE,
    DeploymentPlan,
    Program,
    address,
    gpus_per_worker,
    joins,
    pinned,
    plan,
    roles,
    uses_slurm,
)
from serving.deploy.processes import ports
from serving.deploy.processes.credentials import (
    API_AUTHORITY_FILE,
    API_CERTIFICATE_FILE,
    JOIN_FILE,
    scheme,
)
from serving.deploy.processes.markers import (
    JOINED,
    Record,
    read_joined,
    read_record,
    record_of,
    sweep,
)
from serving.deploy.processes.supervisor import RUN, Supervisor
from serving.deploy.rule_script import FAILURES
from serving.errors import ConfigError, OperatorError
from serving.gpus import Links, nvlink_pairs
from serving.protocol import Role

_TOPOLOGY, _JOINED = "SERVING_TOPOLOGY", "SERVING_JOINED"
"""Tell Snakemake's own sub-processes what the command line said, and whose configuration counts."""


class Deployment(Struct, frozen=True, kw_only=True):
    """`config` has the topology of this run in it. `recorded` is what was deployed before it."""

    config: Config
    plan: DeploymentPlan
    request: Request
    recorded: Record | None
    model_key: str

    @property
    def roles(self) -> tuple[Role, ...]:
        return roles(self.plan.topology)

    @property
    def first_workers(self) -> list[str]:
        """The first program of each role that this machine runs."""
        wanted = {f"{role}": "" for role in self.roles}
        for name in reversed(self.plan.workers):
            wanted[name.split("-")[1]] = name
        return [name for name in wanted.values() if name]

    @property
    def is_head(self) -> bool:
        """Whether other nodes can join what runs here."""
        return self.plan.topology == MULTINODE and not joins(self.config)

    @property
    def checks(self) -> list[str]:
        """Which checks this deployment needs."""
        # TensorRT-LLM brings a UCX of its own: ours working says nothing about it.
        ours = self.config.engine.backend == "torch"
        moves_kv = "decode" in self.roles and ours and self.config.kv_transfer.transport == "ucx"
        contained = self.config.container.runtime != "none"
        gpu = ["gpu"] * (not uses_slurm(self.config))  # jobs compute on others
        return ["host", *gpu, *["ucx"] * moves_kv, *["container"] * contained]

    @property
    def build_checks(self) -> list[str]:
        """Which of them a build waits for: one that runs tools of an image needs the image."""
        inside = self.config.engine.backend == "tensorrt_llm" and "container" in self.checks
        return ["container"] if inside else []

    @property
    def wanted(self) -> Record:
        return record_of(self.plan)

    @property
    def starts_for_smoke_test(self) -> bool:
        """A smoke test of what runs reports failures; it does not heal them."""
        return self.request.serves or self.recorded is None

    def announcement(self) -> str:
        """The URL, and a command to try it; at a node that joined, what it joined."""
        if self.request.joins:
            workers = ", ".join(name.removeprefix("worker-") for name in self.plan.workers)
            return f"\nJoined {self.config.cluster.head} with {workers}."
        listen = self.config.frontend
        url = f"{scheme(listen)}://{address(listen.host, listen.port)}"
        generated = listen.tls_cert_file == API_CERTIFICATE_FILE
        trusting = f" --cacert {API_AUTHORITY_FILE}" if generated else ""
        model = self.config.model.name or self.config.model.id
        body = msgspec.json.encode({"model": model, "prompt": "Hello", "max_tokens": 16}).decode()
        dummy = self.config.engine.weights == "dummy"
        noise = " with dummy weights, so answers are noise," if dummy else ""
        keys = self.config.frontend.api_keys_file
        bearer = f" -H \"authorization: Bearer $(head -n 1 '{keys}')\"" if keys else ""
        return (
            f"\nServing {model} ({self.plan.topology}){noise} at {url}/v1. Try:\n"
            f"  curl -s{trusting} {url}/v1/completions -H 'content-type: application/json'{bearer} -d '{body}'"
            + (self._invitation() if self.is_head else "")
        )

    def _invitation(self) -> str:
        head, port = self.config.cluster.address, self.config.etcd.port
        where = f"{head}:{port}" if port != EtcdConfig().port else head
        missing = [role for role in self.roles if role not in self.config.cluster.head_roles]
        role = missing[0] if missing else "prefill"
        return (
            f"\nOther nodes join with a copy of {JOIN_FILE} as join.pem:\n"
            f"  snakemake join --cores all --config cluster-head={where} cluster-role={role}"
        )


def prepare(raw: Mapping[str, Any], *, main: bool) -> Deployment:
    """Raises OperatorError for whatever makes the run impossible. `main`: not a sub-process."""
    _export_package()
    if main:
        os.environ[FAILURES] = f".snakemake/failures-{os.getpid()}"
    request = _request(main)
    recorded = read_record(RUN)
    if main:
        os.environ.pop(_JOINED, None)
    config = parse(_of_cluster(raw, request, main=main))
    wanted = request.topology or config.deployment.topology
    if wanted == MULTINODE and _JOINED not in os.environ:
        from serving.deploy.cluster import membership as cluster  # its libraries are slow to load

        config = cluster.with_head_addresses(config)
    config = with_built_image(_with_topology(listening(config), request, recorded))
    device, engine = resolve_device(config), engine_fingerprint(config)
    own_gpus = _needs_gpus(config, device) and not uses_slurm(config)
    gpus = _gpus(config) if own_gpus else []
    deployment = Deployment(
        config=config,
        plan=plan(
            config,
            engine_fingerprint=engine,
            device=device,
            dtype=resolve_dtype(config),
            gpus=gpus,
            links=links(config, gpus),
            code={name: source_digest(name) for name in ("worker", "frontend")},
        ),
        request=request,
        recorded=recorded,
        model_key=model_key(config.model, config.engine.weights),
    )
    if main and request.executes and _will_serve(deployment):
        _make_true(deployment)
    return deployment


def _of_cluster(raw: Mapping[str, Any], request: Request, *, main: bool) -> Mapping[str, Any]:
    """On a node that joins, or did: the head's configuration with what is its own."""
    if request.joins:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails is said in our words
        from serving.deploy.cluster import membership as cluster  # its libraries are slow to load

        os.environ[_JOINED] = "1"
        return cluster.join(raw, write=request.executes)
    if main and request.serves:
        if request.executes:
            (RUN / JOINED).unlink(missing_ok=True)
        return raw
    kept = read_joined(RUN) if main or _JOINED in os.environ else None
    if kept is None:
        return raw
    os.environ[_JOINED] = "1"
    return kept


def plain(config: Config) -> dict[str, Any]:
    return as_plain(config)


def encode(parameter: Program | Record) -> str:
    """As a parameter of a rule: text, compared by Snakemake between runs."""
    return msgspec.json.encode(parameter).decode()


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def from_terminal() -> bool:
    """Whether this is Snakemake's own command line; else it is used as a library, and our
    arguments are somebody else's."""
    path = Path(sys.argv[0])
    return path.name == "snakemake" or (path.name == "__main__.py" and "snakemake" in path.parts)


def take_failures() -> list[str]:
    """What the scripts of this run failed with, once."""
    path = Path(os.environ.get(FAILURES, ""))
    if not path.is_file():
        return []
    text = path.read_text()
    path.unlink()
    return [paragraph for paragraph in text.split("\0") if paragraph]


def _export_package() -> None:
    """Scripts of rules, and the programs they start, run this code and no other installed copy."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in before if path and path != str(SCRIPTS)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), *others])


def _request(main: bool) -> Request:
    if not main:
        topology = msgspec.convert(os.environ.get(_TOPOLOGY), Topology | None)
        return Request(targets=(), topology=topology, executes=False)
    os.environ.pop(_TOPOLOGY, None)
    if not from_terminal():
        return Request(targets=(), topology=None, executes=False)
    return from_command_line(sys.argv[1:])


def _with_topology(config: Config, request: Request, recorded: Record | None) -> Config:
    """A target pins it; without any, commands are about what is deployed."""
    topology = request.topology
    if topology is None and not request.serves and recorded is not None:
        topology = recorded.topology
    topology = topology or config.deployment.topology
    if request.executes:
        os.environ[_TOPOLOGY] = topology
    return pinned(config, topology)


def _needs_gpus(config: Config, device: str) -> bool:
    """GPUs that are asked for by name must exist even when `auto` finds none."""
    asked = config.engine.device == "auto" and bool(config.workers.gpus)
    return device == "cuda" or asked


def _gpus(config: Config) -> list[int]:
    return usable_gpus(config.workers.gpus, existing_gpus(), config.engine.backend)


def links(config: Config, gpus: Sequence[int]) -> Links:
    """The driver is only asked when a worker's GPUs are to be neighbours."""
    several = max(gpus_per_worker(config).values(), default=0) > 1
    return nvlink_pairs() if several and len(gpus) > 2 else frozenset()


def _will_serve(deployment: Deployment) -> bool:
    request = deployment.request
    return request.serves or ("smoke_test" in request.targets and deployment.starts_for_smoke_test)


def _make_true(deployment: Deployment) -> None:
    """Markers agree with what runs, and every port that will be needed can be had."""
    if not RUN.is_dir():
        running = {}
    else:
        running = {**Supervisor().state(), **SlurmJobs().state()}
        sweep(deployment.plan, running, RUN)
    for program in deployment.plan.programs:
        if not (RUN / f"{program.name}.up").exists():
            try:
                ports.claim(program.host, program.ports, RUN)
            except ConfigError:
                raise
            except OperatorError as exc:
                raise OperatorError(f"{program.name}: {exc.what}", remedy=exc.remedy) from None
