"""Evidence about the deployment in the working directory: processes, etcd, NATS, frontend, events.

Collecting changes nothing and sends no request to a model. `diagnosis` judges the result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from serving.config import MULTINODE, Config
from serving.config.process import ControlServices
from serving.config.resolve import is_joining_node
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.healing.restart_policy import describe
from serving.deploy.processes.launchers import LOGS, RUN
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.report.diagnosis import Evidence, Position
from serving.deploy.report.service_client import ServiceClient, ServiceFailed
from serving.deploy.report.service_spec import ServiceSpec, read_running_settings
from serving.deploy.security.certificates import client_context
from serving.discovery import Discovery
from serving.errors import OperatorError, ServingError
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.protocol import InstanceInfo, KvEventBatch
from serving.restarts import read_restarts

ASK_S = 3.0
LISTEN_S = 2.5
"""Workers report their load at least once a second."""
TAIL_BYTES = 16384
TAIL_LINES = 4
_COMPLAINTS = ("ERROR", "CRITICAL", "Error:", "panic", "fatal", "Killed")


def cluster_position(config: Config) -> Position:
    if config.deployment.topology != MULTINODE:
        return "alone"
    return "node" if is_joining_node(config) else "head"


async def collect_evidence(spec: ServiceSpec, position: Position) -> Evidence:
    """Ask every part of the deployment. Takes a few seconds."""
    frontend, workers = read_running_settings(RUN)
    supervisor = Supervisor()
    known = {**supervisor.state(), **SlurmJobs().state()}
    states = {name: info.state for name, info in known.items()}
    programs = [f"worker-{worker.instance_id}" for worker in workers]
    programs += ["frontend"] if frontend else []
    if programs and position != "node":
        programs = ["etcd", "nats", *programs]
    answers_supervisor = supervisor.answers()
    logs = {name: last_words(name) for name in programs if states.get(name) != "RUNNING"}
    now = time.time()
    restarts = {name: describe(record, now) for name, record in read_restarts().items()}
    control = frontend.control if frontend else workers[0].control if workers else None
    if control is None:
        return Evidence(
            supervisor=answers_supervisor,
            programs=programs,
            states=states,
            logs=logs,
            restarts=restarts,
        )
    etcd_error, nats_error = await asyncio.gather(_try_etcd(control), _try_nats(control.nats_url))
    ready, frontend_error = None, ""
    if position != "node":
        try:
            async with ServiceClient(spec.url, spec.headers, spec.tls_cert_file) as service:
                ready = await service.ready()
        except ServiceFailed as exc:
            frontend_error = str(exc)
    instances = None if etcd_error else await _registered(control)
    reporting: set[str] | None = None
    snapshots: dict[str, int | str] = {}
    if not nats_error:
        names = [row["instance_id"] for row in ready["instances"]] if ready else []
        reporting, snapshots = await _listen(control, names)
    return Evidence(
        supervisor=answers_supervisor,
        programs=programs,
        states=states,
        logs=logs,
        etcd_error=etcd_error,
        nats_error=nats_error,
        frontend_error=frontend_error,
        instances=instances,
        own_instances=frozenset(i.instance_id for worker in workers for i in worker.instances()),
        ready=ready,
        reporting=reporting,
        snapshots=snapshots,
        restarts=restarts,
        position=position,
    )


def last_words(program: str, logs: Path = LOGS) -> list[str]:
    """The last lines of a program's log that report an error, else its last line."""
    path = logs / f"{program}.log"
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    lines = [line.strip(" |") for line in lines if line.strip(" |+-")]  # exception groups' frames
    complaints = [line for line in lines if any(word in line for word in _COMPLAINTS)]
    return [line[:300] for line in (complaints or lines[-1:])[-TAIL_LINES:]]


async def _try_etcd(control: ControlServices) -> str:
    """Why etcd does not answer; empty when it does."""
    join_file = control.etcd_join_file
    scheme = "https" if join_file else "http"
    try:
        verify = client_context(join_file) if join_file else True
        async with httpx.AsyncClient(timeout=ASK_S, trust_env=False, verify=verify) as client:
            response = await client.get(f"{scheme}://{control.etcd_endpoint}/health")
    except (httpx.HTTPError, OSError) as exc:
        return str(exc) or type(exc).__name__
    healthy = response.status_code == 200 and '"true"' in response.text
    return "" if healthy else f"its health is {response.text.strip()[:200]}"


async def _try_nats(url: str) -> str:
    """A NATS server greets every connection with INFO."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    try:
        async with asyncio.timeout(ASK_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                greeting = await reader.readline()
            finally:
                writer.close()
                await writer.wait_closed()
    except TimeoutError:
        return f"silent for {ASK_S:g} s"
    except OSError as exc:
        return str(exc)
    return "" if greeting.startswith(b"INFO ") else f"{url} is no NATS server"


async def _registered(control: ControlServices) -> list[InstanceInfo] | None:
    async with Discovery.from_settings(control) as discovery:
        try:
            return await discovery.instances(ASK_S)
        except OperatorError:
            return None


async def _listen(
    control: ControlServices, names: Sequence[str]
) -> tuple[set[str], dict[str, int | str]]:
    """The instances whose load reports arrive, and how many blocks each caches."""
    reporting: set[str] = set()
    snapshots: dict[str, int | str] = {}
    all_reported = asyncio.Event()

    def receive(message: KvEventBatch | LoadReport) -> None:
        reporting.add(message.instance_id)
        if reporting >= set(names):
            all_reported.set()

    token = Path(control.nats_token_file)
    async with EventPlane.connect(control.nats_url, control.namespace, token) as events:
        await events.subscribe(receive, receive)
        if names:
            with suppress(TimeoutError):  # silence is a finding, not an error
                await asyncio.wait_for(all_reported.wait(), LISTEN_S)
        for name in names:
            try:
                snapshots[name] = len((await events.request_snapshot(name, ASK_S)).block_hashes)
            except (ServingError, TimeoutError, OSError) as exc:
                snapshots[name] = str(exc) or type(exc).__name__
    return reporting, snapshots
