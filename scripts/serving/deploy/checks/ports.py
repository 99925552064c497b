"""Are the ports of the deployment free, or held by programs of its own?"""

from __future__ import annotations

import socket
from pathlib import Path

from serving.config import Config, connect_address
from serving.config.resolve import is_joining_node
from serving.deploy.checks.findings import Finding
from serving.deploy.processes.ports import require_ports
from serving.errors import OperatorError


def judge_ports(config: Config, run_dir: Path) -> list[Finding]:
    """Each port the deployment will listen on is free, or held by a program of its own."""
    if is_joining_node(config):
        return []  # workers take any that is free
    wanted = {
        "frontend.port": (config.frontend.host, config.frontend.port),
        "etcd.port": (config.etcd.host, config.etcd.port),
        "etcd.peer_port": ("127.0.0.1", config.etcd.peer_port),
        "nats.port": (config.nats.host, config.nats.port),
    }
    findings = []
    for key, (host, port) in wanted.items():
        try:
            # Trying to bind could be in the way of a program of ours that is just starting.
            if _answers(host, port):
                require_ports(host, {key: port}, run_dir)
        except OperatorError as exc:
            findings.append(Finding(key, False, exc.what, exc.remedy))
        else:
            findings.append(Finding(key, True, f"{port} is free or ours"))
    return findings


def _answers(host: str, port: int) -> bool:
    name = connect_address(host, port).rpartition(":")[0].strip("[]")
    try:
        socket.create_connection((name, port), timeout=2).close()
    except OSError:
        return False
    return True
