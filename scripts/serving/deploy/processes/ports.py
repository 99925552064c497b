"""Ports: free, held by this deployment, or held by another process that is then named."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from serving.deploy.processes.tags import tag_of_pid
from serving.errors import ConfigError, OperatorError


def require_ports(host: str, ports: Mapping[str, int], run_dir: Path) -> None:
    """Raises OperatorError for a port that a process of another deployment or program holds.

    `ports` maps config keys to ports. A port held by a program of this deployment passes: the
    supervisor will replace it.
    """
    mine = str(run_dir.resolve())
    for key, port in ports.items():
        if is_free(host, port, key):
            continue
        holders = listeners(port)
        tags = [tag_of_pid(pid) for pid in holders]
        if any(tag is not None and tag.deployment == mine for tag in tags):
            continue
        raise OperatorError(
            f"port {port} on {host} is taken by {_describe(holders)}",
            remedy=f"stop that process, or set `{key}` to another port",
        )


def is_free(host: str, port: int, key: str) -> bool:
    """Whether a program could listen there now.

    Raises ConfigError when `host` is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except PermissionError:
            raise ConfigError(
                key, f"port {port} needs privileges", remedy="choose a port above 1023"
            ) from None
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return False
            section = key.split(".")[0]
            raise ConfigError(
                f"{section}.host",
                f"no program can listen on {host!r} ({exc.strerror})",
                remedy="use an address of this machine, such as 127.0.0.1",
            ) from None
    return True


def listeners(port: int) -> list[int]:
    """Pids that listen on `port`; those of other users may be missing."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return []
    return sorted(
        {
            connection.pid
            for connection in connections
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
            and connection.pid is not None
        }
    )


def _describe(pids: list[int]) -> str:
    names = []
    for pid in pids:
        try:
            names.append(f"pid {pid} ({' '.join(psutil.Process(pid).cmdline())[:120]})")
        except psutil.Error:
            names.append(f"pid {pid}")
    return " and ".join(names) or "a process of another user"
