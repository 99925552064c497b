"""Is a program ready, and is it really ours? One probe for each kind of program.

A probe returns an empty string when the program is ready, and else what is missing. Only an answer
of the process that was started counts. Programs of this project report their launch id; for etcd
and NATS, the listening process must have it in its environment.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from serving.config import connect_address
from serving.config.process import FrontendSettings
from serving.deploy.planning.program import Program
from serving.deploy.processes.ports import listeners
from serving.deploy.processes.tags import tag_of_pid
from serving.deploy.security.api_access import authorization_headers, client_tls
from serving.deploy.security.secret_files import ETCD_SERVER_FILE, JOIN_FILE, NATS_TOKEN_FILE
from serving.errors import OperatorError

Probe = Callable[[Program, str], str]
ANSWER_S = 2.0
FIRST_REQUEST_S = 120.0


def probe_for(name: str) -> Probe:
    return _PROBES.get(name.split("-")[0], probe_worker)


def probe_etcd(program: Program, launch_id: str) -> str:
    port = program.ports["etcd.port"]
    where = connect_address(program.host, port)
    try:
        status, body = _http("GET", where, "/health", None, ANSWER_S, tls=_tls(program))
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer on port {port}: {exc}"
    if status != 200 or body.get("health") != "true":
        return f"/health answers {status} {body}"
    return _held_by_launch(port, launch_id)


def probe_nats(program: Program, launch_id: str) -> str:
    """Connects with the token and gets a PONG."""
    port = program.ports["nats.port"]
    token = Path(NATS_TOKEN_FILE).read_text().strip()
    hello = json.dumps({"auth_token": token, "verbose": False, "name": "readiness"})
    host, _, number = connect_address(program.host, port).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(number)), ANSWER_S) as connection:
            lines = connection.makefile("rb")
            with lines:
                if not lines.readline().startswith(b"INFO "):
                    return f"port {port} does not speak NATS"
                connection.sendall(f"CONNECT {hello}\r\nPING\r\n".encode())
                answer = lines.readline().decode(errors="replace").strip()
    except OSError as exc:
        return f"no answer on port {port}: {exc}"
    if answer != "PONG":
        return f"NATS refuses the connection: {answer}"
    return _held_by_launch(port, launch_id)


def probe_worker(program: Program, launch_id: str) -> str:
    return _announced(program, launch_id)


def probe_frontend(program: Program, launch_id: str) -> str:
    if missing := _announced(program, launch_id):
        return missing
    where = connect_address(program.host, program.ports["frontend.port"])
    try:
        tls = client_tls(msgspec.json.decode(program.settings, type=FrontendSettings).frontend)
        status, body = _http("GET", where, "/health", None, ANSWER_S, tls=tls)
        if status != 200 or body.get("launch_id") != launch_id:
            return f"another process answers on {where}"
        status, body = _http("GET", where, "/ready", None, ANSWER_S, _headers(program), tls)
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer on {where}: {exc}"
    if status == 200 or _has_own_workers(program, body):
        return ""
    return str(body.get("reason") or f"/ready answers {status}")


def _has_own_workers(program: Program, body: Mapping[str, Any]) -> bool:
    """A head is ready with its own workers; workers of other nodes may join at any time."""
    process = msgspec.json.decode(program.settings, type=FrontendSettings)
    seen = {row["instance_id"] for row in body.get("instances") or []}
    return process.own_instances is not None and seen.issuperset(process.own_instances)


def require_first_answer(program: Program) -> None:
    """One token through the whole path. Raises OperatorError that quotes the service."""
    where = connect_address(program.host, program.ports["frontend.port"])
    process = msgspec.json.decode(program.settings, type=FrontendSettings)
    if process.own_instances == []:
        return  # no worker can answer before other nodes join
    headers, model = authorization_headers(process.frontend), process.model_name
    request = {"model": model, "prompt": "Hello", "max_tokens": 1}
    try:
        tls = client_tls(process.frontend)
        status, body = _http(
            "POST", where, "/v1/completions", request, FIRST_REQUEST_S, headers, tls
        )
    except (OSError, http.client.HTTPException) as exc:
        status, body = 0, {"error": {"message": str(exc)}}
    if status != 200:
        error = body.get("error")
        message = error.get("message") if isinstance(error, dict) else body
        raise OperatorError(
            f"the service is up, but its first request failed ({status or 'no answer'}): {message}",
            remedy="run `snakemake doctor`, and see logs/frontend.log",
        )


def _tls(etcd: Program) -> ssl.SSLContext | None:
    if ETCD_SERVER_FILE not in " ".join(etcd.command):
        return None
    from serving.deploy.security.certificates import (
        client_context,  # slow to load, and rarely needed
    )

    return client_context(JOIN_FILE)


def _headers(program: Program) -> dict[str, str]:
    return authorization_headers(
        msgspec.json.decode(program.settings, type=FrontendSettings).frontend
    )


def _announced(program: Program, launch_id: str) -> str:
    path = Path("run") / f"{program.name}.ready"
    try:
        announced = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return "starting"
    return "" if announced.get("launch_id") == launch_id else "starting"


def _held_by_launch(port: int, launch_id: str) -> str:
    tags = [tag_of_pid(pid) for pid in listeners(port)]
    if any(tag is not None and tag.launch_id == launch_id for tag in tags):
        return ""
    return f"another process listens on port {port}"


def _http(
    method: str,
    where: str,
    path: str,
    body: Any,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, Any]]:
    """Status and JSON object (empty for any other body). Ignores proxies: the service is ours."""
    connection: http.client.HTTPConnection
    if tls is None:
        connection = http.client.HTTPConnection(where, timeout=timeout_s)
    else:
        connection = http.client.HTTPSConnection(where, timeout=timeout_s, context=tls)
    try:
        content = None if body is None else json.dumps(body)
        typed = {"content-type": "application/json"} if content else {}
        connection.request(method, path, content, {**typed, **(headers or {})})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = {}
    return response.status, answer if isinstance(answer, dict) else {}


_PROBES: dict[str, Probe] = {
    "etcd": probe_etcd,
    "nats": probe_nats,
    "worker": probe_worker,
    "frontend": probe_frontend,
}
