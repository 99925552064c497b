"""What runs here, as a table for a person. Only looks; takes a few milliseconds."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from serving.config import Config, FrontendConfig
from serving.config.process import ControlServices, FrontendSettings, read_settings
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.planning.topology import MULTINODE, address, joins, stop_tiers
from serving.deploy.processes import processes
from serving.deploy.processes.credentials import authorization, scheme, trust
from serving.deploy.processes.markers import read_marker, read_record
from serving.deploy.processes.supervisor import LOGS, RUN, ProcessInfo, Supervisor
from serving.deploy.report.service import recorded
from serving.errors import OperatorError
from serving.load_report import LoadReport, status_columns
from serving.protocol import InstanceInfo

ANSWER_S = 2.0
_SAMPLE = re.compile(r'^(serving_\w+)\{.*?instance="([^"]+)".*?\} (\S+)$', re.MULTILINE)


class Answers(Struct, frozen=True, kw_only=True):
    """What the frontend said: the body of `/ready`, and prefix hits per instance (0 to 1)."""

    ready: dict[str, Any] = {}
    hit_rates: dict[str, float] = {}


def report(config: Config) -> list[str]:
    """The lines of `snakemake status`."""
    record = read_record(RUN)
    known = {**Supervisor().state(), **SlurmJobs().state()} if RUN.is_dir() else {}
    strays = {tag.program for _, tag in processes.deployed(RUN)} - {""} if not known else set()
    if not known and not strays:
        return ["", "Nothing runs here. Start it with: snakemake serve_disagg", ""]
    listen = _listen(config)
    where = address(listen.host, listen.port)
    head, workers = recorded(RUN)
    control = head.control if head else workers[0].control if workers else None
    node = joins(config)
    answers = Answers()
    if "frontend" in known or "frontend" in strays:
        answers = _ask(where, listen)
    elif node and control:
        answers = _registered(control)
    lines = [""]
    if strays:
        lines += [
            f"supervisord is gone. These go on without it: {', '.join(sorted(strays))}.",
            "Run the serve target again: it starts them anew.",
        ]
    else:
        ordered = [name for tier in reversed(stop_tiers(sorted(known))) for name in tier]
        rows = [_program(known[name], control, answers) for name in ordered]
        rows += [
            (name, "missing", "-", "-", "run the serve target again")
            for name in (record.programs if record else [])
            if name not in known
        ]
        lines += table(("program", "state", "pid", "up", "health"), rows)
    ready = answers.ready
    model = str(ready.get("model") or config.model.name or config.model.id)
    topology = str(ready.get("topology") or (record.topology if record else "unknown"))
    verdict = "ready" if ready.get("ready") else f"not ready: {ready.get('reason') or 'no answer'}"
    noise = " (dummy weights: answers are noise)" if ready.get("dummy_weights") else ""
    lines += [
        "",
        f"model     {model}{noise}",
        f"topology  {topology}, router: {ready.get('policy', '-')}",
    ]
    if node:
        lines += [
            f"head      {config.cluster.head} ({verdict}): `snakemake status` there says more",
            "",
        ]
    else:
        lines += [f"URL       {scheme(listen)}://{where}/v1 ({verdict})", ""]
    instances = [row for row in ready.get("instances") or [] if isinstance(row, dict)]
    if instances:
        hosts = topology == MULTINODE
        lines += [*instance_table(instances, answers.hit_rates, hosts=hosts), ""]
    carried = sorted(
        {f"{r['kv_transport']} over {r['kv_route']}" for r in instances if r.get("kv_route")}
    )
    if carried:
        lines += [f"KV moved by {', '.join(carried)}", ""]
    refused = ready.get("refused") or {}
    return lines + [f"refused: {name}: {reason}" for name, reason in refused.items()]


def instance_table(
    instances: Sequence[Mapping[str, Any]],
    hit_rates: Mapping[str, float],
    *,
    hosts: bool = False,
    definition: type[LoadReport] = LoadReport,
) -> list[str]:
    """The rows of `/ready`, with the columns that `definition` shows. `hosts`: and each's machine."""
    columns = {"instance_id": "instance", "role": "role", **status_columns(definition)}
    titles = [*columns.values(), "hits", *(["host"] if hosts else [])]
    rows = []
    for instance in instances:
        rate = hit_rates.get(str(instance.get("instance_id")))
        row = [str(instance.get(key, "-")) for key in columns]
        row.append("-" if rate is None else f"{rate:.0%}")
        rows.append([*row, str(instance.get("host", "-"))] if hosts else row)
    return table(titles, rows)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    cells = [titles, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    return f"{h}h {m:02}m" if h else f"{m}m {s:02}s"


def hit_rates(metrics: str) -> dict[str, float]:
    """Share of routed prompt tokens that the chosen instance held already, per instance."""
    values: dict[tuple[str, str], float] = {}
    for name, instance, value in _SAMPLE.findall(metrics):
        # A frontend of several processes has a sample from each.
        values[name, instance] = values.get((name, instance), 0.0) + float(value)
    routed = {
        instance: tokens
        for (name, instance), tokens in values.items()
        if name == "serving_routed_prompt_tokens_total" and tokens
    }
    hits = "serving_prefix_hit_tokens_total"
    return {instance: values.get((hits, instance), 0.0) / t for instance, t in routed.items()}


def _registered(control: ControlServices) -> Answers:
    """What etcd says, on a node that has no frontend."""
    from serving.discovery import Discovery  # slow to load, and rarely needed

    async def ask() -> list[InstanceInfo]:
        async with Discovery.from_settings(control) as discovery:
            return await discovery.instances(ANSWER_S)

    try:
        found = asyncio.run(ask())
    except OperatorError as exc:
        return Answers(ready={"reason": exc.what})
    rows = [
        {"instance_id": i.instance_id, "role": i.role, "num_blocks": i.num_blocks, "host": i.host}
        for i in found
    ]
    return Answers(ready={"ready": True, "joined": True, "instances": rows})


def _program(
    info: ProcessInfo, control: ControlServices | None, answers: Answers
) -> tuple[str, ...]:
    if not info.running:
        state = f"{info.state.lower()} ({info.exit_status})"
        return (info.name, state, "-", "-", f"see {LOGS / info.name}.log")
    marker = read_marker(RUN / f"{info.name}.up")
    proven = marker is not None and marker.launch_id == info.launch_id
    health = _health(info.name, control, answers) if proven else "starting"
    pid = info.place or str(info.pid)
    if info.state != "RUNNING" and info.place:
        return (info.name, "waiting", pid, "-", SlurmJobs().obstacle(info.name))
    return (info.name, "running", pid, duration(time.time() - info.started), health)


def _health(name: str, control: ControlServices | None, answers: Answers) -> str:
    if name in {"etcd", "nats"}:
        if control is None:
            return "ready"  # nothing was started that would need it
        endpoint = control.etcd_endpoint if name == "etcd" else control.nats_url
        host, _, port = endpoint.rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        except OSError as exc:
            return f"no answer on port {port}: {exc.strerror or exc}"
        return "ready"
    if name == "frontend":
        return "ready" if answers.ready.get("ready") else "not ready"
    breakers = {
        row.get("instance_id"): row.get("breaker") for row in answers.ready.get("instances") or []
    }
    instance_id = name.removeprefix("worker-")
    if instance_id not in breakers:
        return "not registered" if answers.ready.get("joined") else "not routed to"
    return "ready" if breakers[instance_id] in (None, "closed") else "failed lately: avoided"


def _listen(config: Config) -> FrontendConfig:
    """Where the running frontend was told to listen, whatever the config says by now."""
    try:
        return read_settings(RUN / "frontend.json", FrontendSettings).frontend
    except (OSError, msgspec.MsgspecError):
        return config.frontend


def _ask(where: str, listen: FrontendConfig) -> Answers:
    """Nothing when there is no answer, or it is not one of ours."""
    try:
        ready = json.loads(_get(where, "/ready", listen))
        metrics = _get(where, "/metrics", listen).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError):
        return Answers()
    return Answers(
        ready=ready if isinstance(ready, dict) else {},
        hit_rates=hit_rates(metrics),
    )


def _get(where: str, path: str, listen: FrontendConfig) -> bytes:
    connection: http.client.HTTPConnection
    if (tls := trust(listen)) is not None:
        connection = http.client.HTTPSConnection(where, timeout=ANSWER_S, context=tls)
    else:
        connection = http.client.HTTPConnection(where, timeout=ANSWER_S)
    try:
        connection.request("GET", path, headers=authorization(listen))
        return connection.getresponse().read()
    finally:
        connection.close()
