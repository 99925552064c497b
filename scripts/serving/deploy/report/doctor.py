"""Why is it not working: look at every part of the deployment in the working directory.

Nothing is changed by looking. The only traffic is one short prompt, sent twice when the service
is ready, to see the second one routed to the blocks of the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import httpx

from serving.config import Config
from serving.config.process import ControlServices
from serving.deploy.checks.findings import Finding, render
from serving.deploy.checks.ports import judge_ports
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.planning.topology import MULTINODE, joins
from serving.deploy.processes.certificates import client_context
from serving.deploy.processes.supervisor import LOGS, RUN, Supervisor
from serving.deploy.report.diagnosis import Evidence, diagnose, judge_routing
from serving.deploy.report.service import Expected, Service, ServiceFailed, expected, recorded
from serving.deploy.report.smoke import cached_tokens, long_prompt
from serving.discovery import Discovery
from serving.errors import OperatorError, ServingError
from serving.events import EventPlane
from serving.load_report import LoadReport
from serving.progress import Report
from serving.protocol import InstanceInfo, KvEventBatch

ASK_S = 3.0
LISTEN_S = 2.5
"""Workers report their load at least once a second."""
TAIL_BYTES = 16384
TAIL_LINES = 4
_COMPLAINTS = ("ERROR", "CRITICAL", "Error:", "panic", "fatal", "Killed")


async def examine(config: Config) -> list[Finding]:
    """All findings about the deployment that `run/` and `logs/` tell of."""
    told = expected(RUN, config)
    evidence, control = await _collect(told, _place(config))
    findings = [*diagnose(evidence), *judge_ports(config, RUN)]
    state = evidence.ready
    if control and state and state["ready"]:
        findings.append(await _prove_routing(told, state["policy"]))
    return findings


def conclude_doctor(findings: Sequence[Finding], *, report: Report) -> None:
    """Tell everything; raises OperatorError when something is wrong that is more than a warning."""
    for finding in findings:
        report(render(finding))
    wrong = [finding for finding in findings if finding.blocks]
    if wrong:
        first = wrong[0]
        raise OperatorError(
            f"{len(wrong)} of {len(findings)} findings are wrong, first {first.name}: "
            f"{first.detail}",
            remedy=first.remedy,
        )
    report(f"nothing wrong in {len(findings)} findings")


def _place(config: Config) -> Literal["alone", "head", "node"]:
    if config.deployment.topology != MULTINODE:
        return "alone"
    return "node" if joins(config) else "head"


async def _collect(
    told: Expected, place: Literal["alone", "head", "node"]
) -> tuple[Evidence, ControlServices | None]:
    frontend, workers = recorded(RUN)
    supervisor = Supervisor()
    known = {**supervisor.state(), **SlurmJobs().state()}
    states = {name: info.state for name, info in known.items()}
    wanted = [f"worker-{worker.instance_id}" for worker in workers]
    wanted += ["frontend"] if frontend else []
    if wanted and place != "node":
        wanted = ["etcd", "nats", *wanted]
    control = frontend.control if frontend else workers[0].control if workers else None
    evidence = Evidence(
        supervisor=supervisor.answers(),
        wanted=wanted,
        states=states,
        logs={name: last_words(name) for name in wanted if states.get(name) != "RUNNING"},
    )
    if control is None:
        return evidence, None
    etcd_error, nats_error = await asyncio.gather(_try_etcd(control), _try_nats(control.nats_url))
    ready, frontend_error = None, ""
    if place != "node":
        try:
            async with Service(told.url, told.headers, told.tls_cert_file) as service:
                ready = await service.ready()
        except ServiceFailed as exc:
            frontend_error = str(exc)
    instances = None if etcd_error else await _registered(control)
    heard: set[str] | None = None
    snapshots: dict[str, int | str] = {}
    if not nats_error:
        names = [row["instance_id"] for row in ready["instances"]] if ready else []
        heard, snapshots = await _listen(control, names)
    return (
        Evidence(
            supervisor=evidence.supervisor,
            wanted=wanted,
            states=states,
            logs=evidence.logs,
            etcd_error=etcd_error,
            nats_error=nats_error,
            frontend_error=frontend_error,
            instances=instances,
            ready=ready,
            heard=heard,
            snapshots=snapshots,
            place=place,
        ),
        control,
    )


def last_words(program: str, logs: Path = LOGS) -> list[str]:
    """The last lines of a program's log that complain, else simply its last line."""
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
    """What keeps etcd from answering, or nothing."""
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
    """Who reports its load, and what each says that it caches."""
    heard: set[str] = set()
    snapshots: dict[str, int | str] = {}
    all_heard = asyncio.Event()

    def hear(news: KvEventBatch | LoadReport) -> None:
        heard.add(news.instance_id)
        if heard >= set(names):
            all_heard.set()

    token = Path(control.nats_token_file)
    async with EventPlane.connect(control.nats_url, control.namespace, token) as events:
        await events.subscribe(hear, hear)
        if names:
            with suppress(TimeoutError):  # who was not heard is the finding
                await asyncio.wait_for(all_heard.wait(), LISTEN_S)
        for name in names:
            try:
                snapshots[name] = len((await events.request_snapshot(name, ASK_S)).block_hashes)
            except (ServingError, TimeoutError, OSError) as exc:
                snapshots[name] = str(exc) or type(exc).__name__
    return heard, snapshots


async def _prove_routing(told: Expected, policy: str) -> Finding:
    """Send one prompt twice and see what was cached, and whether the index knew."""
    try:
        async with Service(told.url, told.headers, told.tls_cert_file) as service:
            await service.first_model()
            prompt = long_prompt(told)
            cold = cached_tokens(await service.chat(prompt, 4))
            await asyncio.sleep(0.5)  # its cache events are on their way to the index
            before = await service.samples("serving_prefix_hit_tokens_total")
            warm = cached_tokens(await service.chat(prompt, 4))
            after = await service.samples("serving_prefix_hit_tokens_total")
    except ServiceFailed as exc:
        return Finding(
            "kv routing", False, f"the prompt failed: {exc}", "logs/frontend.log has the request"
        )
    # A prompt that goes through two instances has hits on both; one that a decode instance computes
    # by itself, as it does when it holds all but a block, on that one alone.
    known = max((value - before.get(labels, 0.0) for labels, value in after.items()), default=0.0)
    return judge_routing(policy, cold, warm, known, told.block_size)
