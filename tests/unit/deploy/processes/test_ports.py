"""A foreign holder of a port is named; our own passes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving.deploy.processes import ports, tags
from serving.errors import ConfigError, OperatorError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_free_port_passes(taken: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    ports.require_ports("127.0.0.1", {"frontend.port": free}, tmp_path)
    assert ports.is_free("127.0.0.1", free, "frontend.port")
    assert not ports.is_free("127.0.0.1", taken, "frontend.port")


def test_foreign_holder_is_named_with_the_key_to_change(taken: int, tmp_path: Path) -> None:
    with pytest.raises(OperatorError) as caught:
        ports.require_ports("127.0.0.1", {"nats.port": taken}, tmp_path)
    assert f"pid {os.getpid()}" in caught.value.what
    assert "pytest" in caught.value.what
    assert "`nats.port`" in caught.value.remedy


def test_port_held_by_this_deployment_passes_and_by_another_does_not(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    program = (
        "import socket\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "print(s.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, tags.DEPLOYMENT: str(run)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        ports.require_ports("127.0.0.1", {"etcd.port": port}, run)
        with pytest.raises(OperatorError, match=f"pid {holder.pid}"):
            ports.require_ports("127.0.0.1", {"etcd.port": port}, other)
        holder.stdin.write("\n")


def test_address_of_another_machine_names_the_host_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`frontend.host`: no program can listen on '192.0.2.1'"):
        ports.require_ports("192.0.2.1", {"frontend.port": 18999}, tmp_path)
