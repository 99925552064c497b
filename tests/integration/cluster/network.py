"""What a client on the network sees of this machine."""

from __future__ import annotations

import socket

import psutil
import pytest


def outside_address() -> str:
    """An IPv4 address of this machine that is not loopback. Skips the test without one."""
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return entry.address
    pytest.skip("this machine has no IPv4 address but loopback")


def answer_to(address: tuple[str, int], data: bytes) -> bytes:
    """Send `data` over TCP; returns the answer until the server hangs up or falls silent."""
    answer = b""
    with socket.create_connection(address, 0.5) as connection:
        try:
            connection.sendall(data)
            while received := connection.recv(65536):
                answer += received
        except (TimeoutError, ConnectionError):
            pass
    return answer
