"""Ports that the kernel keeps strangers from."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
from serving.kv_transfer import ucx
from serving.kv_transfer.ucx_port import MAX_ADDRESSES, GuardedPorts

PEER, STRANGER = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def guarded() -> Iterator[tuple[GuardedPorts, socket.socket]]:
    with socket.create_server(("0.0.0.0", 0)) as before:
        ports = GuardedPorts()
        with ports.opened_by(lambda: socket.create_server(("127.0.0.1", 0))) as listener:
            assert ports.ports == [listener.getsockname()[1]]
            assert reaches(before, STRANGER)
            yield ports, listener


def reaches(listener: socket.socket, source: str) -> bool:
    port = listener.getsockname()[1]
    try:
        socket.create_connection(("127.0.0.1", port), 0.3, (source, 0)).close()
    except TimeoutError:
        return False
    return True


def test_nobody_is_let_in_at_first(guarded: tuple[GuardedPorts, socket.socket]) -> None:
    _, listener = guarded
    assert not reaches(listener, PEER)


def test_only_who_was_met_is_let_in(guarded: tuple[GuardedPorts, socket.socket]) -> None:
    ports, listener = guarded
    ports.let_in(["10.1.2.3", PEER, "localhost", "::1", ""])
    assert reaches(listener, PEER)
    assert not reaches(listener, STRANGER)
    ports.let_in([STRANGER])
    assert reaches(listener, PEER)
    assert reaches(listener, STRANGER)


def test_as_many_as_the_kernel_takes(guarded: tuple[GuardedPorts, socket.socket]) -> None:
    """The latest stay."""
    ports, listener = guarded
    ports.let_in([STRANGER])
    ports.let_in(f"10.0.{number // 256}.{number % 256}" for number in range(MAX_ADDRESSES))
    ports.let_in([PEER])
    assert reaches(listener, PEER)
    assert not reaches(listener, STRANGER)


def test_a_connection_outlives_the_memory_of_its_peer(
    guarded: tuple[GuardedPorts, socket.socket],
) -> None:
    ports, listener = guarded
    ports.let_in([PEER])
    with socket.create_connection(listener.getsockname(), 1, (PEER, 0)) as client:
        accepted, _ = listener.accept()
        ports.let_in(f"10.0.{number // 256}.{number % 256}" for number in range(MAX_ADDRESSES))
        assert not reaches(listener, PEER)
        with accepted:
            client.sendall(b"still here")
            assert accepted.recv(16) == b"still here"


def test_a_port_is_free_as_soon_as_its_owner_closes_it() -> None:
    ports = GuardedPorts()
    listener = ports.opened_by(lambda: socket.create_server(("127.0.0.1", 0)))
    address = listener.getsockname()
    listener.close()
    assert ports.ports == []
    ports.let_in([PEER])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 1)


def test_own_hosts_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(text: str) -> SimpleNamespace:
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        return SimpleNamespace(family=family, address=text)

    interfaces = {
        "lo": [address("127.0.0.1"), address("::1")],
        "eth0": [address("10.1.2.3"), address("10.1.2.4"), address("fe80::1")],
        "eth1": [address("10.9.9.9")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert ucx.own_hosts("eth0") == ["10.1.2.3", "10.1.2.4"]
    assert ucx.own_hosts("lo") == ["127.0.0.1"]
    assert ucx.own_hosts(None) == ["127.0.0.1", "10.1.2.3", "10.1.2.4", "10.9.9.9"]
    assert ucx.own_hosts("gone") == []
