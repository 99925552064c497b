"""Ports that the kernel closes to unknown addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from serving.kv_transfer.transports.ucx.guarded_ports import MAX_ADDRESSES, GuardedPorts

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


def test_no_address_is_admitted_at_first(guarded: tuple[GuardedPorts, socket.socket]) -> None:
    _, listener = guarded
    assert not reaches(listener, PEER)


def test_only_who_was_met_is_admit(guarded: tuple[GuardedPorts, socket.socket]) -> None:
    ports, listener = guarded
    ports.admit(["10.1.2.3", PEER, "localhost", "::1", ""])
    assert reaches(listener, PEER)
    assert not reaches(listener, STRANGER)
    ports.admit([STRANGER])
    assert reaches(listener, PEER)
    assert reaches(listener, STRANGER)


def test_the_oldest_addresses_are_forgotten_beyond_what_the_kernel_takes(
    guarded: tuple[GuardedPorts, socket.socket],
) -> None:
    ports, listener = guarded
    ports.admit([STRANGER])
    ports.admit(f"10.0.{number // 256}.{number % 256}" for number in range(MAX_ADDRESSES))
    ports.admit([PEER])
    assert reaches(listener, PEER)
    assert not reaches(listener, STRANGER)


def test_a_connection_stays_open_when_its_address_is_forgotten(
    guarded: tuple[GuardedPorts, socket.socket],
) -> None:
    ports, listener = guarded
    ports.admit([PEER])
    with socket.create_connection(listener.getsockname(), 1, (PEER, 0)) as client:
        accepted, _ = listener.accept()
        ports.admit(f"10.0.{number // 256}.{number % 256}" for number in range(MAX_ADDRESSES))
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
    ports.admit([PEER])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 1)
