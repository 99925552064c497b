"""What runs here, as tables for a person. Only looks; takes a few milliseconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from serving.config import MULTINODE, Config, FrontendConfig, connect_address
from serving.config.process import ControlServices, FrontendSettings, read_settings
from serving.config.resolve import is_joining_node
from serving.console import coloured, table_lines
from serving.deploy.cluster.slurm import SlurmJobs
from serving.deploy.healing.exits import how_it_ended
from serving.deploy.healing.restart_policy import describe
from serving.deploy.planning.program import stop_tiers
from serving.deploy.processes.launchers import LOGS, RUN, WATCHER, ProcessInfo
from serving.deploy.processes.markers import read_marker
from serving.deploy.processes.supervisor import Supervisor
from serving.deploy.processes.tags import deployed_processes
from serving.deploy.processes.topology_record import read_record
from serving.deploy.report.service_answers import (
    ANSWER_S,
    ServiceAnswers,
    ask_etcd,
    ask_frontend,
)
from serving.deploy.report.service_spec import read_running_settings
from serving.deploy.security.api_access import url_scheme
from serving.load_report import LoadReport, status_columns
from serving.progress import Report
from serving.restarts import RestartRecord, read_restarts

_WEDGED = "gets no requests"


def report_status(config: Config, report: Report) -> None:
    """Report the programs, the service and its instances."""
    for line in status_lines(config):
        report(line)


def status_lines(config: Config) -> list[str]:
    programs = {**Supervisor().state(), **SlurmJobs().state()} if RUN.is_dir() else {}
    strays = set()
    if not programs:
        strays = {tag.program for _, tag in deployed_processes(RUN)} - {"", WATCHER}
    if not programs and not strays:
        return ["", "Nothing runs here. Start it with: snakemake serve_disagg", ""]
    listen = _frontend_config(config)
    frontend, workers = read_running_settings(RUN)
    control = frontend.control if frontend else workers[0].control if workers else None
    answers = ServiceAnswers()
    if "frontend" in programs or "frontend" in strays:
        answers = ask_frontend(connect_address(listen.host, listen.port), listen)
    elif is_joining_node(config) and control:
        answers = ask_etcd(control)
    return [
        "",
        *(_stray_lines(strays) if strays else _program_lines(programs, control, answers)),
        "",
        *_service_lines(config, listen, answers),
        *_instance_lines(answers),
    ]


def _stray_lines(strays: set[str]) -> list[str]:
    return [
        f"supervisord is gone. These programs run without it: {', '.join(sorted(strays))}.",
        "Run the serve target again: it restarts them.",
    ]


def _program_lines(
    programs: Mapping[str, ProcessInfo], control: ControlServices | None, answers: ServiceAnswers
) -> list[str]:
    """Programs in the order of their start, then those that should run and do not."""
    record = read_record(RUN)
    ordered = [name for tier in reversed(stop_tiers(sorted(programs))) for name in tier]
    restarts = read_restarts()
    rows = [
        _program_row(programs[name], control, answers, restarts.get(name, RestartRecord()))
        for name in ordered
    ]
    rows += [
        (name, "missing", "-", "-", "run the serve target again")
        for name in (record.programs if record else [])
        if name not in programs
    ]
    return table_lines(("program", "state", "pid", "up", "health"), rows)


def _text_only_line(text: Mapping[str, Any]) -> str:
    without = ", ".join(text["left_out"])
    return f"          text only: the language model of {text['architecture']}" + (
        f", without {without}" if without else ""
    )


def _service_lines(config: Config, listen: FrontendConfig, answers: ServiceAnswers) -> list[str]:
    """Model, topology and URL, or the head that this node works for."""
    ready = answers.ready
    model = str(ready.get("model") or config.model.name or config.model.id)
    verdict = coloured("ready")
    if missing := ready.get("missing_roles"):
        verdict += f", without {' and '.join(missing)} workers"
    if not ready.get("ready"):
        verdict = f"{coloured('not ready')}: {ready.get('reason') or 'no answer'}"
    noise = " (dummy weights: answers are noise)" if ready.get("dummy_weights") else ""
    text = ready.get("text_only")
    if is_joining_node(config):
        last = f"head      {config.cluster.head} ({verdict}): `snakemake status` there shows more"
    else:
        address = connect_address(listen.host, listen.port)
        last = f"URL       {url_scheme(listen)}://{address}/v1 ({verdict})"
    context, answers_by = ready.get("max_model_len"), ready.get("answers") or {}
    return [
        f"model     {model}{noise}",
        *([_text_only_line(text)] if text else []),
        *([f"context   {context} tokens, prompt and answer"] if context else []),
        *([_answer_line(answers_by)] if answers_by else []),
        f"topology  {_topology(answers)}, router: {ready.get('policy', '-')}",
        last,
        "",
    ]


def _answer_line(answers: dict[str, str]) -> str:
    """The formats in which the model calls tools and reasons, and the reasons for them."""
    return (
        f"answers   tool calls: {answers['tool_parser']} ({answers['tool_parser_reason']}); "
        f"reasoning: {answers['reasoning_parser']} ({answers['reasoning_parser_reason']})"
    )


def _instance_lines(answers: ServiceAnswers) -> list[str]:
    """A table of the instances, how KV reaches them, and the instances that were refused."""
    ready = answers.ready
    lines: list[str] = []
    instances = [row for row in ready.get("instances") or [] if isinstance(row, dict)]
    if instances:
        hosts = _topology(answers) == MULTINODE
        lines += [*instance_table(instances, answers.hit_rates, hosts=hosts), ""]
    routes = {(row["kv_transport"], row["kv_route"]) for row in instances if row.get("kv_route")}
    if routes:
        shown = ", ".join(f"{transport} over {route}" for transport, route in sorted(routes))
        lines += [f"KV is transferred by {shown}", ""]
    refused = ready.get("refused") or {}
    return lines + [f"refused: {name}: {reason}" for name, reason in refused.items()]


def instance_table(
    instances: Sequence[Mapping[str, Any]],
    hit_rates: Mapping[str, float],
    *,
    hosts: bool = False,
    definition: type[LoadReport] = LoadReport,
) -> list[str]:
    """The rows of `/ready`, with the columns that `definition` shows; with `hosts`, their machines."""
    columns = {"instance_id": "instance", "role": "role", **status_columns(definition)}
    titles = [*columns.values(), "hits", *(["host"] if hosts else [])]
    rows = []
    for instance in instances:
        rate = hit_rates.get(str(instance.get("instance_id")))
        row = [str(instance.get(key, "-")) for key in columns]
        row.append("-" if rate is None else f"{rate:.0%}")
        rows.append([*row, str(instance.get("host", "-"))] if hosts else row)
    return table_lines(titles, rows)


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    return f"{h}h {m:02}m" if h else f"{m}m {s:02}s"


def _topology(answers: ServiceAnswers) -> str:
    record = read_record(RUN)
    return str(answers.ready.get("topology") or (record.topology if record else "unknown"))


def _program_row(
    info: ProcessInfo,
    control: ControlServices | None,
    answers: ServiceAnswers,
    restarts: RestartRecord,
) -> tuple[str, ...]:
    history = describe(restarts, time.time())
    if not info.running:
        deaths = restarts.deaths
        how = deaths[-1].how if deaths else how_it_ended(info.name, info.exit_status)
        state = f"{info.state.lower()} ({how})" if not info.location else info.state.lower()
        return (info.name, state, "-", "-", _end_note(info, history))
    marker = read_marker(RUN / f"{info.name}.up")
    proven = marker is not None and marker.launch_id == info.launch_id
    health = _health(info.name, control, answers) if proven else "starting"
    pid = info.location or str(info.pid)
    if info.state != "RUNNING" and info.location:
        return (info.name, "waiting", pid, "-", SlurmJobs().pending_reason(info.name))
    state = "wedged" if health.startswith(_WEDGED) else "running"
    shown = f"{health}; {history}" if history else health
    return (info.name, state, pid, duration(time.time() - info.started), shown)


def _end_note(info: ProcessInfo, history: str) -> str:
    see = f"see {LOGS / info.name}.log"
    return f"{history}; {see}" if history else see


def _health(name: str, control: ControlServices | None, answers: ServiceAnswers) -> str:
    if name in {"etcd", "nats"}:
        if control is None:
            return "ready"  # no program that needs it was started
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
    wedged = {
        row.get("instance_id"): row.get("wedged") for row in answers.ready.get("instances") or []
    }
    if reason := wedged.get(instance_id):
        return f"{_WEDGED}: {reason}"
    if instance_id not in breakers:
        return "not registered" if answers.ready.get("joined") else "not routed to"
    return "ready" if breakers[instance_id] in (None, "closed") else "failed recently: avoided"


def _frontend_config(config: Config) -> FrontendConfig:
    """The settings that the frontend was started with, or the config without such a start."""
    try:
        return read_settings(RUN / "frontend.json", FrontendSettings).frontend
    except (OSError, msgspec.MsgspecError):
        return config.frontend
