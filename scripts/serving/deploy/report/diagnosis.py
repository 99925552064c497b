"""From evidence about a deployment to findings: what is wrong, and what to do. Pure: no I/O.

Each function judges one part of the `Evidence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from msgspec import Struct

from serving.deploy.checks.findings import Finding
from serving.protocol import InstanceInfo, ModelCard

_START = "run the same `snakemake serve_*` again: it starts what is missing"


Position = Literal["alone", "head", "node"]
"""This machine's position in a cluster of several."""


class Evidence(Struct, frozen=True, kw_only=True):
    """Error texts are empty when the program answered; None means that the evidence was not collected.

    `programs` should run here, `states` is supervisord's view of them (`RUNNING`, `EXITED`...), and
    `logs` has the last lines of those that do not run. `ready` is the body of the frontend's
    `/ready`. `own_instances` are those that workers of this machine host. `reporting` are the instances whose load reports arrived, and `snapshots` the number
    of block hashes that each instance caches, or why it did not answer. With a `position` other
    than `alone`, other machines have workers too; a `node` has no frontend. `restarts` describes the
    programs that ended by themselves.
    """

    supervisor: bool
    programs: list[str]
    states: dict[str, str]
    logs: dict[str, list[str]]
    own_instances: frozenset[str] = frozenset()
    etcd_error: str = ""
    nats_error: str = ""
    frontend_error: str = ""
    instances: list[InstanceInfo] | None = None
    ready: dict[str, Any] | None = None
    reporting: set[str] | None = None
    snapshots: dict[str, int | str] = {}
    restarts: dict[str, str] = {}
    position: Position = "alone"


def diagnose(evidence: Evidence) -> list[Finding]:
    """Every finding, causes before consequences."""
    if not evidence.programs:
        return [
            Finding("deployment", False, "nothing was started here", "`snakemake serve_disagg`")
        ]
    return [
        _supervisor(evidence),
        *_programs(evidence),
        *_control_services(evidence),
        *_registrations(evidence),
        *_agreement(evidence),
        *_frontend(evidence),
        *_events(evidence),
        *_transfers(evidence),
    ]


def _supervisor(evidence: Evidence) -> Finding:
    if evidence.supervisor:
        return Finding("supervisor", True, "supervisord answers")
    return Finding("supervisor", False, "no supervisord answers on run/supervisor.sock", _START)


def _programs(evidence: Evidence) -> Iterable[Finding]:
    if not evidence.supervisor:
        return
    for name in evidence.programs:
        state = evidence.states.get(name, "not started")
        last_lines = " | ".join(evidence.logs.get(name, []))
        detail = f"{state}; its log ends: {last_lines}" if last_lines else state
        history = evidence.restarts.get(name, "")
        if state != "RUNNING" and history:
            detail = f"{history}; {detail}"
        yield Finding(name, state == "RUNNING", detail, f"read logs/{name}.log; then {_START}")
        if state == "RUNNING" and history:
            yield Finding(
                f"{name} stays up",
                False,
                history,
                f"logs/{name}.log shows what happened before it ended",
                warning=True,
            )


def _control_services(evidence: Evidence) -> Iterable[Finding]:
    for name, error, meaning in (
        ("etcd", evidence.etcd_error, "discovery keeps its last known members"),
        ("nats", evidence.nats_error, "each frontend routes by its own load counts only"),
    ):
        detail = f"does not answer ({error}); {meaning}" if error else "answers"
        yield Finding(f"{name} reachable", not error, detail, _START)


def _registrations(evidence: Evidence) -> Iterable[Finding]:
    """Each running worker holds a lease in etcd, and no other instance does."""
    if evidence.instances is None:
        return
    registered = {info.instance_id for info in evidence.instances}
    workers = [n.removeprefix("worker-") for n in evidence.programs if n.startswith("worker-")]
    for instance in workers:
        yield Finding(
            f"{instance} registered",
            instance in registered,
            "has a lease in etcd" if instance in registered else "has no lease in etcd",
            f"if it is RUNNING, logs/worker-{instance}.log says why it cannot register; else {_START}",
        )
    hosts = {info.instance_id: info.host for info in evidence.instances}
    for instance in sorted(registered - evidence.own_instances - set(workers)):
        if evidence.position != "alone":
            yield Finding(f"{instance} registered", True, f"from {hosts[instance]}")
            continue
        yield Finding(
            f"{instance} registered",
            False,
            "is in etcd, but this deployment has no such worker",
            "give each deployment that shares an etcd its own deployment.namespace",
            warning=True,
        )


def _agreement(evidence: Evidence) -> Iterable[Finding]:
    """Routing compares block hashes, so all workers need the same block size and salt."""
    cards = {info.instance_id: info.model for info in evidence.instances or []}
    if not cards:
        return
    aspects: dict[str, Callable[[ModelCard], Any]] = {
        "block size": lambda card: card.block_size,
        "hash salt": lambda card: card.hash_salt,
        "model": lambda card: card.name,
    }
    if (
        evidence.position == "alone"
    ):  # on several machines it may differ, because it covers the model's path
        aspects["engine"] = lambda card: card.engine_fingerprint
    for name, aspect in aspects.items():
        values = {instance: aspect(card) for instance, card in cards.items()}
        same = len(set(values.values())) == 1
        shown = next(iter(values.values())) if same else _pairs(values)
        yield Finding(f"one {name}", same, str(shown), "restart the workers that differ: " + _START)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in sorted(values.items()))


def _frontend(evidence: Evidence) -> Iterable[Finding]:
    """The frontend can serve, refuses no instance, and is connected to all that are in etcd."""
    state = evidence.ready
    if evidence.position == "node":
        return
    if state is None:
        yield Finding("frontend answers", False, evidence.frontend_error, _START)
        return
    yield Finding(
        "frontend ready",
        bool(state["ready"]),
        str(state.get("reason") or f"{state['topology']}, policy {state['policy']}"),
        "the findings above say which worker is missing",
    )
    for instance, reason in state.get("refused", {}).items():
        yield Finding(f"{instance} accepted", False, f"refused: {reason}", "restart it: " + _START)
    connected = {row["instance_id"] for row in state["instances"]}
    lost = {info.instance_id for info in evidence.instances or []} - connected
    for row in state["instances"]:
        if row.get("wedged"):
            yield Finding(
                f"{row['instance_id']} computes",
                False,
                f"it gets no requests: {row['wedged']}",
                f"it is replaced by itself; logs/worker-{row['instance_id']}.log shows where it hung",
            )
    for instance in sorted(lost - set(state.get("refused", {}))):
        yield Finding(
            f"{instance} connected",
            False,
            "is in etcd, but the frontend has no connection to it",
            f"logs/frontend.log and logs/worker-{instance}.log say why",
        )


def _events(evidence: Evidence) -> Iterable[Finding]:
    """Load reports and cache contents arrive over NATS, and the frontend's index follows them."""
    if evidence.reporting is None or evidence.ready is None:
        return
    for row in evidence.ready["instances"]:
        instance = row["instance_id"]
        reports = instance in evidence.reporting
        snapshot = evidence.snapshots.get(instance, "not requested")
        if isinstance(snapshot, str):
            held = f"no snapshot: {snapshot}"
        else:
            held = f"it caches {snapshot} blocks"
        yield Finding(
            f"{instance} events",
            reports and not isinstance(snapshot, str),
            f"{'load reports arrive' if reports else 'no load report arrived'}, {held}",
            f"look for NATS in logs/worker-{instance}.log; workers recover on their own after NATS restarts",
        )
        yield Finding(
            f"{instance} index",
            row["synchronised"],
            "the frontend's prefix index follows it"
            if row["synchronised"]
            else "the frontend waits for its snapshot",
            "it asks again on its own; if this persists, look for the instance in logs/frontend.log",
            warning=True,
        )


def _transfers(evidence: Evidence) -> Iterable[Finding]:
    """A failed KV transfer costs time, but no answer, so it is only a warning."""
    for row in (evidence.ready or {}).get("instances", []):
        if row["role"] == "decode":
            failures, transfers = row["kv_transfer_failures"], row["kv_transfers"]
            yield Finding(
                f"{row['instance_id']} kv transfer",
                not failures,
                f"{transfers} over {row['kv_transport']}{_route(row['kv_route'])}, {failures} failed "
                f"({row['local_prefill_fallbacks']} prompts prefilled locally)",
                f"logs/worker-{row['instance_id']}.log names the cause; `snakemake check_ucx` "
                "tests UCX alone",
                warning=True,
            )


def _route(route: str) -> str:
    return f" ({route})" if route else ""


def judge_routing(policy: str, cold: int, warm: int, known: float, block_size: int) -> Finding:
    """For one prompt that was sent twice. `cold` and `warm` are its cached tokens, `known` is the number of tokens that the index expected to be cached."""
    detail = f"cached tokens {cold}, then {warm}; the index expected {known:.0f}"
    if policy != "kv":
        return Finding("kv routing", True, f"not in use: router.policy is {policy}")
    remedy = (
        "see the findings above about events and block sizes; engine.kv_cache_tokens may be too "
        "small for one prompt"
    )
    return Finding("kv routing", warm >= cold + block_size and known > 0, detail, remedy)
